"""Which samples a row of the batch gets, and in which order: sources, their shares, and a global shuffle.

The order depends on the seed alone, and any position in it is computed in microseconds, so that resuming after n
samples costs the same for every n. Every row of the batch is a *lane* with its own order: lane v of V takes the
numbers v, v + V, ... of each source's endless shuffle. The order does not depend on which host serves a lane, so
that a run may go on with another number of hosts.

    number j of lane v in source i  ->  shuffle_i[j * V + v]  ->  a sample of the source

Without the shuffle the lanes take turns on one repeated list, all sources one after the other:

    position k of lane v  ->  k * V + v, modulo the samples of all sources  ->  a source and a sample of it
"""

import dataclasses
import os
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kangaroo_jax.data.annotations.formats import Columns
from kangaroo_jax.data.annotations.sources import AnnotationFile
from kangaroo_jax.data.batches.packing import SampleIndex
from kangaroo_jax.data.batches.shuffle import EndlessShuffle
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.json_text import parse_json, utf8

_VERSION = re.compile(r"\d+\.\d+\.\d+")  # the folder that `kangaroo data build` writes into
_SPEC = re.compile(r"^(.*?)(?:%(\d+(?:\.\d+)?))?$", re.DOTALL)
_BLOCKS = (256, 4096, 65_536)  # positions over which shares of sources are exact
_SUBSET_SEED = 0x5B5E7  # selects the samples that NAME%50 keeps; the same in every run


@dataclasses.dataclass(frozen=True)
class Source:
    """Annotations, how many of their samples make an epoch, and their weight (0: proportional to that)."""

    name: str
    file: AnnotationFile
    percent: float = 100.0  # 50: a fixed half of the samples; 300: each three times an epoch
    weight: float | None = None  # share of the mixture; None: by the number of samples
    names: tuple[str, ...] = ()  # names by which a saved run may know it, the shortest first

    @property
    def count(self) -> int:
        """Samples in an epoch."""
        return max(1, round(len(self.file) * self.percent / 100))

    def sample(self, number: int, *, in_order: bool = False) -> int:
        """The sample in the file for a number below `count`: whole copies first, then a fixed part of them.

        The part is drawn at random, or, `in_order`, spread evenly over the file.
        """
        copy, rest = divmod(number, len(self.file))
        if (copy + 1) * len(self.file) <= self.count:
            return rest
        if in_order:
            return rest * len(self.file) // (self.count - copy * len(self.file))
        return EndlessShuffle(len(self.file), _SUBSET_SEED)[rest]


class Mixture:
    """Sources and the lanes' orders over them."""

    def __init__(self, sources: Sequence[Source], seed: int, lanes: int, *, shuffle: bool = True) -> None:
        """`lanes` is V, the rows of the whole batch; without `shuffle` the samples come in the files' order.

        Raises UserError for weights that cannot be kept.
        """
        self.sources, self.seed, self.lanes, self.shuffle = list(sources), seed, lanes, shuffle
        if not shuffle and any(source.weight is not None for source in self.sources):
            raise UserError("config.data.shuffle is False, so that sources follow one another: drop their weights")
        self._ends = np.cumsum([source.count for source in self.sources])
        self._shuffles = self._orders()
        weights = [source.count if source.weight is None else source.weight for source in self.sources]
        if not sum(weights) > 0 or min(weights) < 0:
            raise UserError(f"config.data.weights {weights} must not be negative, nor all 0")
        self.shares = np.array(weights, np.float64) / sum(weights)
        names = [source.name for source in self.sources]
        self.counts = _apportion(self.shares, names) if shuffle else np.diff(self._ends, prepend=0)

    def _orders(self) -> list[EndlessShuffle]:
        """The order of each source, by its name where there are several."""
        single = len(self.sources) == 1
        return [
            EndlessShuffle(source.count, self.seed if single else self.seed ^ zlib.crc32(utf8(source.name)))
            for source in self.sources
        ]

    def keep_names(self, saved: Mapping[str, Sequence[int]]) -> None:
        """Give the sources the names of a saved run, so that each goes on where it was; new sources get unused names.

        Names are the shortest that are unique, so that a source added in front may otherwise take another's name.
        """
        mine, names = self.identity(), dict.fromkeys(range(len(self.sources)), "")
        for name, value in saved.items():
            same = [i for i, s in enumerate(self.sources) if not names[i] and list(mine[s.name]) == list(value)]
            called = [i for i in same if self.sources[i].name == name] or [
                i for i in same if name in self.sources[i].names
            ]
            if called:
                names[called[0]] = name
        rest = [i for i, name in names.items() if not name]
        taken = [*saved, *(name for name in names.values() if name)]
        fresh = _unique([[self.sources[i].name, *self.sources[i].names] for i in rest], taken)
        for i, name in zip(rest, fresh, strict=True):
            own = self.sources[i].name  # a changed source keeps its name, so that the error names it
            names[i] = own if own in saved and own not in names.values() else name
        self.sources[:] = [dataclasses.replace(s, name=names[i]) for i, s in enumerate(self.sources)]
        self._shuffles = self._orders()

    @property
    def epoch(self) -> int:
        """Samples of all sources."""
        return int(self._ends[-1])

    def sample_index(self, lane: int, source: int, number: int) -> SampleIndex:
        """The sample at `number` of a lane's share of a source."""
        shuffled = self._shuffles[source][number * self.lanes + lane]
        return source, self.sources[source].sample(shuffled)

    def in_order(self, lane: int, k: int) -> SampleIndex:
        """The sample at position k of a lane without shuffling."""
        number = k * self.lanes + lane
        if number == self.epoch:
            message = f"data.shuffle is False and all {number} samples were used: they begin again with the first"
            warnings.warn(message, stacklevel=2)
        number %= self.epoch
        source = int(np.searchsorted(self._ends, number, side="right"))
        before = int(self._ends[source - 1]) if source else 0
        return source, self.sources[source].sample(number - before, in_order=True)

    def order(self) -> dict[str, Any]:
        """What the order depends on besides `identity`. Without a shuffle that includes the list of sources."""
        return {"seed": self.seed} if self.shuffle else {"sources": [source.name for source in self.sources]}

    def identity(self) -> dict[str, list[int]]:
        """What must be the same for a saved position to mean the same: samples and bytes of each source."""
        return {source.name: [source.count, source.file.bytes] for source in self.sources}


class Lane:
    """The order of one row of the batch: an endless stream of positions, with a state of a few numbers."""

    def __init__(self, mixture: Mixture, number: int) -> None:
        """A lane at its first position."""
        self._mixture, self._number = mixture, number
        self.next = 0  # positions since the shares were last changed
        self.taken = [0] * len(mixture.sources)  # numbers of each source that were used up before that
        self._block, self._which, self._rank = -1, np.zeros(0, np.int64), np.zeros(0, np.int64)

    def at(self, k: int) -> SampleIndex:
        """The sample at position k since the shares were last changed."""
        if not self._mixture.shuffle:
            return self._mixture.in_order(self._number, k)
        counts = self._mixture.counts
        if len(counts) == 1:
            return self._mixture.sample_index(self._number, 0, self.taken[0] + k)
        block, i = divmod(k, int(counts.sum()))
        self._load(block)
        source = int(self._which[i])
        number = self.taken[source] + block * int(counts[source]) + int(self._rank[i])
        return self._mixture.sample_index(self._number, source, number)

    def used(self, k: int) -> list[int]:
        """How many samples of each source come before position k."""
        counts = self._mixture.counts
        block, i = divmod(k, int(counts.sum()))
        self._load(block)
        inside = np.bincount(self._which[:i], minlength=len(counts))
        return [int(t + block * c + n) for t, c, n in zip(self.taken, counts, inside, strict=True)]

    def _load(self, block: int) -> None:
        """The sources of a block's positions in random order, and each position's rank among its source's."""
        if block == self._block:
            return
        rng = np.random.Generator(np.random.Philox(key=[self._mixture.seed & (2**64 - 1), self._number << 40 | block]))
        which = rng.permutation(np.repeat(np.arange(len(self._mixture.counts)), self._mixture.counts))
        rank = np.empty_like(which)
        for source in range(len(self._mixture.counts)):
            mine = which == source
            rank[mine] = np.arange(mine.sum())
        self._block, self._which, self._rank = block, which, rank


def _apportion(shares: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """The number of positions of each source in a block, by largest remainders, in the shortest block that is exact."""
    for size in _BLOCKS:
        exact = shares * size
        counts: np.ndarray = np.floor(exact).astype(np.int64)
        for i in np.argsort(counts - exact, kind="stable")[: size - counts.sum()]:
            counts[i] += 1
        if (np.abs(counts - exact) <= 0.002 * exact).all():
            break
    for name, share, count in zip(names, shares, counts, strict=True):
        if share > 0 and not count:
            raise UserError(f"source {name!r} has a share of {share:.1e} of the mixture, too small to be kept; drop it")
    return counts


# ------------------------------------------------------------------------------- from config


def open_sources(
    train: Sequence[str], media_root: str, registry: str = "", weights: Sequence[float] = (), *, check: bool = True
) -> list[Source]:
    """The sources of a config.

    Args:
        train: annotation files or names of the registry, each with `%50` for a part (or `%300` for
            repeats); a LLaMA-Factory `dataset_info.json` stands for all that it lists.
        media_root: folder of the media of files that are named here; "" is each file's own folder.
        registry: a JSON file of names: Qwen's {"annotation_path", "data_path"} (and "weight", "repeats") or
            LLaMA-Factory's rows.
        weights: how often each source is drawn; () draws by size, or by the registry's weights.
        check: read records as the files are opened; see `AnnotationFile`.

    Raises:
        UserError: a file or name is missing or wrong, or there are not as many weights as sources.
    """
    if not train:
        raise UserError("config.data.train is empty: name at least one annotation file (JSON, JSONL, Parquet, tar)")
    known = _read_registry(registry) if registry else {}
    entries: list[tuple[str, float, dict[str, Any]]] = []
    for spec in train:
        match = None if spec in known or os.path.exists(spec) else _SPEC.match(spec)
        path, percent = (match[1], float(match[2] or 100)) if match else (spec, 100.0)
        if not percent > 0:
            raise UserError(f"config.data.train: {spec!r} takes nothing of its source; drop it")
        if path in known:
            entries.append((path, percent, known[path]))
        elif os.path.basename(path) == "dataset_info.json" and os.path.isfile(path):
            entries += [(name, percent, entry) for name, entry in _read_registry(path).items()]
        else:
            entries.append((path, percent, {"path": path, "root": media_root}))
    if weights and len(weights) != len(entries):
        raise UserError(f"config.data.weights has {len(weights)} values for {len(entries)} sources")
    candidates = [_names(name) for name, _, _ in entries]
    names = _unique(candidates)
    sources = []
    for i, (_, percent, entry) in enumerate(entries):
        file = AnnotationFile(entry["path"], entry["root"], columns=entry.get("columns"), check=check)
        weight = float(weights[i]) if weights else entry.get("weight")
        sources.append(Source(names[i], file, percent * entry.get("repeats", 1), weight, tuple(candidates[i])))
    if any(s.weight is None for s in sources) and any(s.weight is not None for s in sources):
        raise UserError(f"{registry}: give a weight to all of {', '.join(names)}, or to none")
    return sources


def _names(path: str) -> list[str]:
    """Candidate names of a source: the file's stem or the built dataset's name, with more and more parent folders."""
    parts = Path(os.path.splitext(path)[0]).parts or (path,)
    version = [parts] if len(parts) > 1 and _VERSION.fullmatch(os.path.basename(path.rstrip("/"))) else []
    stems = [parts[:-1], *version] if version else [parts]  # the last is how earlier versions named it
    return ["/".join(stem[-k:]) for stem in stems for k in range(1, len(stem) + 1)]


def _unique(candidates: Sequence[Sequence[str]], taken: Sequence[str] = ()) -> list[str]:
    """The first candidate name of each source that no other source has."""
    names = list(taken)
    for possible in candidates:
        name = next((n for n in possible if n not in names), None)
        number = sum(list(other) == list(possible) for other in candidates[: len(names) - len(taken)]) + 1
        names.append(name or f"{possible[-1]} ({number})")
    return names[len(taken) :]


def _read_registry(path: str) -> dict[str, dict[str, Any]]:
    folder = os.path.dirname(path) or "."
    try:
        table = parse_json(Path(path).read_bytes(), path)
    except OSError as error:
        raise UserError(f"{path}: cannot read the registry of sources ({error.strerror or error})") from None
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        raise UserError(f"{path}: expected an object of names, each with an object that says where its data is")
    return {name: _entry(path, folder, name, row) for name, row in table.items()}


def _entry(path: str, folder: str, name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    extra = {key: float(row[key]) for key in ("weight", "repeats") if isinstance(row.get(key), (int, float))}
    if isinstance(row.get("annotation_path"), str):
        return {"path": row["annotation_path"], "root": row.get("data_path") or "", **extra}
    if isinstance(row.get("file_name"), str):
        file = os.path.join(folder, row["file_name"])
        return {"path": file, "root": folder, "columns": _columns(row), **extra}
    remote = next((key for key in ("hf_hub_url", "ms_hub_url", "script_url", "cloud_file_name") if row.get(key)), None)
    what = f"is a {remote}; download it and give its file_name" if remote else "has no annotation_path or file_name"
    raise UserError(f"{path}: source {name!r} {what}")


def _columns(row: Mapping[str, Any]) -> Columns:
    """LLaMA-Factory's `formatting`, `columns` and `tags`."""
    columns, tags = row.get("columns") or {}, row.get("tags") or {}
    found = {"formatting": row.get("formatting", "alpaca")}
    for mine, theirs in (("messages", "messages"), ("system", "system"), ("images", "images"), ("videos", "videos")):
        found |= {mine: columns[theirs]} if columns.get(theirs) else {}
    for key in ("prompt", "query", "response", "history"):
        found |= {key: columns[key]} if columns.get(key) else {}
    names = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    for theirs, mine in (names | {"system_tag": "system_role"}).items():
        found |= {mine: tags[theirs]} if tags.get(theirs) else {}
    return Columns(**found)
