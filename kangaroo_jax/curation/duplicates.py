"""Near-duplicates among all clips: equal files first, then fingerprints that differ in few bits.

Comparing every pair would grow with the square of the clips. Instead clips that agree exactly in some bits of one key
frame's hash meet in a bucket, and only those are compared: `tables` random choices of bits for each key frame. The
number of bits grows with the number of clips, so that buckets stay small and a small set is compared almost in full.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from kangaroo_jax.curation.stages.base import Row

_MOST_IN_BUCKET = 64  # a clip is compared with so many that follow it there (a title card may be in all)
_BLOCK = 1 << 20  # pairs compared at a time


def groups(rows: Sequence[Row], *, most_bits: int, tables: int) -> list[int]:
    """For each row the index of the first row of its group; rows that are like no other are groups of one.

    Args:
        rows: with `probe.sha256`, and `fingerprint` where there is one.
        most_bits: of 64, the median over the key frames that both clips have, plain or mirrored.
        tables: choices of bits for each key frame.
    """
    parents = list(range(len(rows)))
    first: dict[tuple[Any, ...], int] = {}
    for i, row in enumerate(rows):
        same = first.setdefault((row["probe"]["sha256"], row["start"], row["end"]), i)
        _join(parents, same, i)
    plain, mirrored = _hashes(rows, "plain"), _hashes(rows, "mirrored")
    items = np.unique([row["item"] for row in rows], return_inverse=True)[1] if rows else np.zeros(0, int)
    for one, two in _pairs(plain, mirrored, tables):
        apart = items[one] != items[two]  # clips of one video may look alike: a fixed camera, a speaker
        for a, b in _close(one[apart], two[apart], plain, mirrored, most_bits):
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
    """uint64[clips, key frames]; 0 where there is none (a hash that is 0 says as little)."""
    values = [row.get("fingerprint", {}).get(name, []) for row in rows]
    frames = max((len(value) for value in values), default=0)
    hashes = np.zeros((len(rows), frames), np.uint64)
    for i, value in enumerate(values):
        hashes[i, : len(value)] = [int(text or "0", 16) for text in value]
    return hashes


def _pairs(plain: np.ndarray, mirrored: np.ndarray, tables: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of clips to compare: arrays of first and of second indices, those of one key frame at a time."""
    clips, frames = plain.shape
    if clips < 2:
        return
    width = int(np.clip(np.ceil(np.log2(clips)), 6, 24))
    rng = np.random.default_rng(0)
    # A clip and the mirror images of all others: they meet their own kind, or their reflections.
    both = np.concatenate([plain, mirrored])
    owner = np.concatenate([np.arange(clips), np.arange(clips)])
    for frame in range(frames):
        known = np.flatnonzero(both[:, frame])
        met = np.zeros(0, np.int64)
        for _ in range(tables):
            bits = rng.choice(64, width, replace=False).astype(np.uint64)
            key = both[known, frame] & np.bitwise_or.reduce(np.uint64(1) << bits)
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
    one: np.ndarray, two: np.ndarray, plain: np.ndarray, mirrored: np.ndarray, most_bits: int
) -> list[tuple[int, int]]:
    """Those of the pairs that are near-duplicates."""
    near = np.zeros(len(one), bool)
    for other in (plain, mirrored):
        known = (plain[one] != 0) & (other[two] != 0)
        bits = np.where(known, np.bitwise_count(plain[one] ^ other[two]), 99).astype(np.int64)
        bits.sort(axis=1)
        count = known.sum(1)
        middle = (np.maximum(count, 1) - 1) / 2
        index = np.arange(len(one))
        median = (bits[index, np.floor(middle).astype(int)] + bits[index, np.ceil(middle).astype(int)]) / 2
        enough = count * 2 > np.maximum((plain[one] != 0).sum(1), (other[two] != 0).sum(1))
        near |= enough & (median <= most_bits)
    return list(zip(one[near].tolist(), two[near].tolist(), strict=True))
