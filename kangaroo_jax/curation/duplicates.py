"""Near-duplicates among all clips: equal files, fingerprints that differ in few bits, embeddings that are close.

The number of pairs is quadratic, so only clips in one bucket are compared (locality-sensitive hashing): those that
agree in some bits of a key frame's hash, with `tables` random choices of bits for each key frame. The number of bits
grows with the number of clips, so that buckets stay small and a small set is compared almost in full.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from kangaroo_jax.curation.stages.base import Row
from kangaroo_jax.curation.stages.embedding import unpacked

_MOST_IN_BUCKET = 64  # a clip is compared with at most so many others there (a title card may be in all)
_BLOCK = 1 << 20  # pairs compared at a time
_CLUSTER = 8192  # up to so many clips are compared pairwise by embedding; more are divided into clusters
_ROUNDS = 6  # iterations of k-means


def groups(
    rows: Sequence[Row],
    *,
    most_bits: float,
    tables: int,
    share: float = 0.5,
    mirror: bool = True,
    flat: bool = True,
    most_seconds: float = 0.0,
    least_cosine: float = 0.0,
) -> list[int]:
    """For each row the index of the first row of its group; a row without near-duplicates is its own group.

    Args:
        rows: clips with `probe.sha256`, and `fingerprint` if there is one.
        most_bits: the largest difference in bits of each 64, over the key frames that both clips have.
        tables: random choices of bits for each key frame.
        share: the quantile over the frames that `most_bits` limits: 0.5 is the median, 1 the frame that differs most.
        mirror: whether a clip is also compared with the mirror images of others.
        flat: whether a frame that is flat in only one of two clips is ignored; otherwise it differs in all bits.
        most_seconds: the largest difference in length; 0 is any.
        least_cosine: the smallest cosine of two near-duplicates' embeddings; 0 compares no embeddings.
    """
    parents = list(range(len(rows)))
    first: dict[tuple[Any, ...], int] = {}
    for i, row in enumerate(rows):
        same = first.setdefault((row["probe"]["sha256"], row["start"], row["end"]), i)
        _join(parents, same, i)
    plain = _hashes(rows, "plain")
    mirrored = _hashes(rows, "mirrored") if mirror else np.zeros_like(plain)
    items = np.unique([row["item"] for row in rows], return_inverse=True)[1] if rows else np.zeros(0, int)
    seconds = np.array([(row["end"] or 0.0) - (row["start"] or 0.0) for row in rows])
    for one, two in _pairs(plain, mirrored, tables):
        apart = items[one] != items[two]  # clips of one video may look alike: a fixed camera, a speaker
        if most_seconds:
            apart &= np.abs(seconds[one] - seconds[two]) <= most_seconds
        for a, b in _close(one[apart], two[apart], plain, mirrored, most_bits, share, flat):
            _join(parents, a, b)
    for a, b in _alike(rows, least_cosine) if least_cosine else ():
        if items[a] != items[b]:
            _join(parents, a, b)
    return [_root(parents, i) for i in range(len(rows))]


def _root(parents: list[int], i: int) -> int:
    while parents[i] != i:
        parents[i] = parents[parents[i]]
        i = parents[i]
    return i


def _join(parents: list[int], a: int, b: int) -> None:
    a, b = _root(parents, a), _root(parents, b)
    parents[max(a, b)] = min(a, b)


def _hashes(rows: Sequence[Row], name: str) -> np.ndarray:
    """uint64[clips, key frames, words]; 0 means no hash; a true hash of 0 is ignored too."""
    values = [row.get("fingerprint", {}).get(name, []) for row in rows]
    frames = max((len(value) for value in values), default=0)
    words = max((len(text) // 16 for value in values for text in value), default=1) or 1
    hashes = np.zeros((len(rows), frames, words), np.uint64)
    for i, value in enumerate(values):
        for k, text in enumerate(value):
            hashes[i, k, : len(text) // 16] = [int(text[at : at + 16], 16) for at in range(0, len(text), 16)]
    return hashes


def _pairs(plain: np.ndarray, mirrored: np.ndarray, tables: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of clips to compare, as arrays of first and second indices, for one key frame at a time."""
    clips, frames, words = plain.shape
    if clips < 2:
        return
    width = int(np.clip(np.ceil(np.log2(clips)), 6, 24))
    rng = np.random.default_rng(0)
    # Plain and mirrored hashes share the buckets, so that a clip meets copies and mirror images.
    both = np.concatenate([plain, mirrored])
    owner = np.concatenate([np.arange(clips), np.arange(clips)])
    for frame in range(frames):
        known = np.flatnonzero(both[:, frame].any(1))
        met = np.zeros(0, np.int64)
        for _ in range(tables):
            bits = rng.choice(64 * words, width, replace=False)
            key = np.zeros(len(known), np.uint64)
            for bit in bits:
                key = key << np.uint64(1) | (both[known, frame, bit // 64] >> np.uint64(bit % 64)) & np.uint64(1)
            order = np.argsort(key, kind="stable")
            met = np.union1d(met, _bucket_pairs(key[order], owner[known][order], clips))
        for begin in range(0, len(met), _BLOCK):
            yield met[begin : begin + _BLOCK] // clips, met[begin : begin + _BLOCK] % clips


def _bucket_pairs(keys: np.ndarray, owners: np.ndarray, clips: int) -> np.ndarray:
    """Pairs of owners whose keys are equal, as int64 first * clips + second; `keys` are sorted."""
    found = []
    for step in range(1, min(_MOST_IN_BUCKET, len(keys))):
        same = np.flatnonzero(keys[step:] == keys[:-step])
        if not same.size:
            break
        one, two = owners[same], owners[same + step]
        found.append((np.minimum(one, two) * clips + np.maximum(one, two))[one != two])
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _close(
    one: np.ndarray,
    two: np.ndarray,
    plain: np.ndarray,
    mirrored: np.ndarray,
    most_bits: float,
    share: float,
    flat: bool,
) -> list[tuple[int, int]]:
    """The pairs that are near-duplicates."""
    near = np.zeros(len(one), bool)
    for other in (plain, mirrored):
        in_one, in_two = plain[one].any(2), other[two].any(2)
        known = in_one & in_two if flat else in_one | in_two
        apart = np.bitwise_count(plain[one] ^ other[two]).sum(2) / plain.shape[2]
        bits = np.where(in_one & in_two, apart, np.where(known, 64.0, 99.0))
        bits.sort(axis=1)
        count = known.sum(1)
        place = (np.maximum(count, 1) - 1) * share
        below, index = np.floor(place).astype(int), np.arange(len(one))
        above = bits[index, np.ceil(place).astype(int)]
        of_share = bits[index, below] + (above - bits[index, below]) * (place - below)
        enough = count * 2 > np.maximum(in_one.sum(1), in_two.sum(1))
        near |= enough & (of_share <= most_bits)
    return list(zip(one[near].tolist(), two[near].tolist(), strict=True))


# ------------------------------------------------------------------------------ embeddings


def _alike(rows: Sequence[Row], least: float) -> Iterator[tuple[int, int]]:
    """Pairs of rows whose embeddings have at least that cosine; many rows are first divided into clusters.

    All sums are over whole numbers, so they are the same on any machine. Clustering follows SemDeDup (Abbas et al.,
    arXiv 2303.09540); pairs whose clips fall into different clusters are not found.
    """
    known = np.array([i for i, row in enumerate(rows) if "embedding" in row], np.int64)
    if not known.size:
        return
    vectors = np.stack([unpacked(rows[i]["embedding"]["vector"]) for i in known]).astype(np.float64)
    lengths = np.maximum(np.linalg.norm(vectors, axis=1), 1e-9)
    for members in _clusters(vectors, lengths):
        for first in range(0, len(members), 1024):
            some = members[first : first + 1024]
            cosine = vectors[some] @ vectors[members].T / lengths[some, None] / lengths[members]
            for i, j in zip(*np.nonzero(cosine >= least), strict=True):
                if some[i] < members[j]:
                    yield int(known[some[i]]), int(known[members[j]])


def _clusters(vectors: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Indices of similar vectors: spherical k-means with about `_CLUSTER` members in a cluster."""
    count = -(-len(vectors) // _CLUSTER)
    if count == 1:
        yield np.arange(len(vectors))
        return
    centres = vectors[:: len(vectors) // count][:count]
    for _ in range(_ROUNDS):
        scale = np.maximum(np.linalg.norm(centres, axis=1), 1e-9)
        nearest = np.concatenate([(part @ centres.T / scale).argmax(1) for part in np.array_split(vectors, count)])
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, np.round(vectors / lengths[:, None] * 127))
        centres = np.round(sums / np.maximum(np.abs(sums).max(1, keepdims=True), 1) * 127)
    for k in range(count):
        yield np.flatnonzero(nearest == k)
