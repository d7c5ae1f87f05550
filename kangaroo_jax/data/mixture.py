"""Which samples a row of the batch sees, and in which order: sources, their shares, and a global shuffle.

The order is a function of the seed alone and any place in it costs microseconds, so that going on after n
samples costs the same for every n. Every row of the batch is a *lane* with an order of its own: lane v of V
takes the numbers v, v + V, ... of each source's endless shuffle. Which host serves a lane changes nothing, so
that a run may go on with another number of hosts.

    number j of lane v in source i  ->  shuffle_i[j * V + v]  ->  a sample of the source

Without the shuffle the lanes take turns on one list, all sources one after the other, again and again:

    place k of lane v  ->  k * V + v, modulo the samples of all sources  ->  a source and a sample of it
"""

import dataclasses
import json
import os
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kangaroo_jax.conventions import UserError
from kangaroo_jax.data.formats import Columns
from kangaroo_jax.data.packing import Place
from kangaroo_jax.data.shuffle import EndlessShuffle
from kangaroo_jax.data.sources import AnnotationFile

_SPEC = re.compile(r"^(.*?)(?:%(\d+(?:\.\d+)?))?$", re.DOTALL)
_BLOCKS = (256, 4096, 65_536)  # places over which shares of sources are exact
_SUBSET_SEED = 0x5B5E7  # of the samples that NAME%50 keeps, the same in every run


@dataclasses.dataclass(frozen=True)
class Source:
    """Annotations, how many of their samples make an epoch, and their weight (0: proportional to that)."""

    name: str
    file: AnnotationFile
    percent: float = 100.0  # 50: a fixed half of the samples; 300: each thrice an epoch
    weight: float | None = None  # of the mixture; None: by the number of samples

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
        """`lanes` is V, the rows of the whole batch; without `shuffle` the samples come as the files have them.

        Raises UserError for weights that cannot be kept.
        """
        self.sources, self.seed, self.lanes, self.shuffle = list(sources), seed, lanes, shuffle
        if not shuffle and any(source.weight is not None for source in self.sources):
            raise UserError("config.data.shuffle is False, so that sources follow one another: drop their weights")
        self._ends = np.cumsum([source.count for source in self.sources])
        single = len(self.sources) == 1
        self._shuffles = [
            EndlessShuffle(source.count, seed if single else seed ^ zlib.crc32(source.name.encode()))
            for source in self.sources
        ]
        weights = [source.count if source.weight is None else source.weight for source in self.sources]
        if not sum(weights) > 0 or min(weights) < 0:
            raise UserError(f"config.data.weights {weights} must not be negative, nor all 0")
        self.shares = np.array(weights, np.float64) / sum(weights)
        names = [source.name for source in self.sources]
        self.counts = _apportion(self.shares, names) if shuffle else np.diff(self._ends, prepend=0)

    @property
    def epoch(self) -> int:
        """Samples of all sources."""
        return int(self._ends[-1])

    def place(self, lane: int, source: int, number: int) -> Place:
        """The sample that is `number` of a lane in a source."""
        shuffled = self._shuffles[source][number * self.lanes + lane]
        return source, self.sources[source].sample(shuffled)

    def in_order(self, lane: int, k: int) -> Place:
        """The sample that is at place k of a lane where nothing is shuffled."""
        number = k * self.lanes + lane
        if number == self.epoch:
            message = f"data.shuffle is False and all {number} samples were used: they begin again with the first"
            warnings.warn(message, stacklevel=2)
        number %= self.epoch
        source = int(np.searchsorted(self._ends, number, side="right"))
        before = int(self._ends[source - 1]) if source else 0
        return source, self.sources[source].sample(number - before, in_order=True)

    def order(self) -> dict[str, Any]:
        """What the order depends on, besides `identity`; without a shuffle no source may be added."""
        return {"seed": self.seed} if self.shuffle else {"sources": [source.name for source in self.sources]}

    def identity(self) -> dict[str, list[int]]:
        """What must be the same for a saved place to mean the same: samples and bytes of each source."""
        return {source.name: [source.count, source.file.bytes] for source in self.sources}


class Lane:
    """The order of one row of the batch: an endless stream of places, with a state of a few numbers."""

    def __init__(self, mixture: Mixture, number: int) -> None:
        """At its beginning."""
        self._mixture, self._number = mixture, number
        self.next = 0  # places since the shares were last changed
        self.taken = [0] * len(mixture.sources)  # numbers of each source that were used up before that
        self._block, self._which, self._rank = -1, np.zeros(0, np.int64), np.zeros(0, np.int64)

    def at(self, k: int) -> Place:
        """The sample at place k since the shares were last changed."""
        if not self._mixture.shuffle:
            return self._mixture.in_order(self._number, k)
        counts = self._mixture.counts
        if len(counts) == 1:
            return self._mixture.place(self._number, 0, self.taken[0] + k)
        block, i = divmod(k, int(counts.sum()))
        self._load(block)
        source = int(self._which[i])
        number = self.taken[source] + block * int(counts[source]) + int(self._rank[i])
        return self._mixture.place(self._number, source, number)

    def used(self, k: int) -> list[int]:
        """How many of each source's numbers come before place k."""
        counts = self._mixture.counts
        block, i = divmod(k, int(counts.sum()))
        self._load(block)
        inside = np.bincount(self._which[:i], minlength=len(counts))
        return [int(t + block * c + n) for t, c, n in zip(self.taken, counts, inside, strict=True)]

    def _load(self, block: int) -> None:
        """The sources of a block's places in random order, and each place's rank among its source's."""
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
    """Places of each source in a block, by largest remainders; a longer block where a short one is not exact."""
    for size in _BLOCKS:
        exact = shares * size
        counts = np.floor(exact).astype(np.int64)
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
    train: Sequence[str], media_root: str, registry: str = "", weights: Sequence[float] = ()
) -> list[Source]:
    """The sources of a config.

    Args:
        train: annotation files or names of the registry, each with `%50` for a part (or `%300` for
            repeats); a LLaMA-Factory `dataset_info.json` stands for all that it lists.
        media_root: folder of the media of files that are named here; "" is each file's own folder.
        registry: a JSON file of names: Qwen's {"annotation_path", "data_path"} (and "weight", "repeats") or
            LLaMA-Factory's rows.
        weights: one a source, how often it is drawn; () draws by size, or by the registry's weights.

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
    names = _unique([name for name, _, _ in entries])
    sources = []
    for i, (_, percent, entry) in enumerate(entries):
        file = AnnotationFile(entry["path"], entry["root"], columns=entry.get("columns"))
        weight = float(weights[i]) if weights else entry.get("weight")
        sources.append(Source(names[i], file, percent * entry.get("repeats", 1), weight))
    if any(s.weight is None for s in sources) and any(s.weight is not None for s in sources):
        raise UserError(f"{registry}: give a weight to all of {', '.join(names)}, or to none")
    return sources


def _unique(paths: Sequence[str]) -> list[str]:
    """Short names, one a source: the file's without its ending, with as many folders as it takes."""
    names: list[str] = []
    for path in paths:
        parts = Path(os.path.splitext(path)[0]).parts or (path,)
        name = next((n for n in ("/".join(parts[-k:]) for k in range(1, len(parts) + 1)) if n not in names), None)
        names.append(name or f"{path} ({sum(other == path for other in paths[: len(names)]) + 1})")
    return names


def _read_registry(path: str) -> dict[str, dict[str, Any]]:
    folder = os.path.dirname(path) or "."
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the registry of sources ({error.strerror or error})") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
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
