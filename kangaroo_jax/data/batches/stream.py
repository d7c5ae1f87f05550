"""The lanes' samples to PackedBatches: packing, requests for media, arrays; and the state of all that."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain

from kangaroo_jax.conventions import PackedBatch
from kangaroo_jax.data.batches.feed import LaneFeed, Made, RecipeMaker, Unusable, path_in
from kangaroo_jax.data.batches.ledger import Ledger
from kangaroo_jax.data.batches.mixture import Lane, Mixture, Source
from kangaroo_jax.data.batches.packing import Packer, PackItem, SampleIndex, Shape, assemble, first_frames
from kangaroo_jax.data.batches.sample import Recipe
from kangaroo_jax.data.batches.sharing import Asked, Sharing
from kangaroo_jax.data.media.decode import Decoder, Outcome
from kangaroo_jax.data.media.video import Clip
from kangaroo_jax.errors import UserError

_RECIPES_AHEAD = 64  # recipes made ahead, over all lanes
_AHEAD = (2, 8)  # the least and the most batches whose media are being decoded at a time
_PIXELS_AHEAD = 4 << 30  # bytes that more than the least may take


def batches_ahead(threads: int, rows: int, row_bytes: int) -> int:
    """How many batches of a host's `rows` are decoded at a time: with few rows, more, so that more threads have work.

    `row_bytes` are those of a row's pixels.
    """
    least, most = _AHEAD
    wanted = -(-threads // rows)
    return max(least, min(most, wanted, _PIXELS_AHEAD // max(1, rows * row_bytes)))


@dataclasses.dataclass(frozen=True)
class LoaderStats:
    """The contents of a batch: samples, tokens and frames in use; `skipped` counts from the start of the stream.

    `sources` and `languages` count the samples; `token_capacity` and `frame_capacity` are B * T and B * F.
    """

    samples: int
    tokens: int
    frames: int
    skipped: int
    sample_ids: tuple[str, ...]
    token_capacity: int = 0
    frame_capacity: int = 0
    sources: Mapping[str, int] = dataclasses.field(default_factory=dict)
    languages: Mapping[str, int] = dataclasses.field(default_factory=dict)
    by_both: Mapping[str, int] = dataclasses.field(default_factory=dict)  # "source/language"
    rows: tuple[tuple[str, ...], ...] = ()  # "source/language" of each sample of each row, in order of segments

    def to_json(self) -> dict[str, Any]:
        """The fields that a line of the metrics has."""
        return {
            "tokens": self.tokens,
            "frames": self.frames,
            "useful_tokens": round(self.tokens / max(self.token_capacity, 1), 4),
            "useful_frames": round(self.frames / max(self.frame_capacity, 1), 4),
            "sources": dict(self.by_both),
            "samples": self.samples,
        }


@dataclasses.dataclass(frozen=True)
class _Settings:
    """How `PackedBatches` packs and decodes."""

    lanes: Sequence[int]
    shape: Shape
    bins: int
    decoder: Decoder
    sharing: Sharing
    ledger: Ledger
    strict: bool
    threads: int


class PackedBatches(grain.IterDataset):  # type: ignore[misc]  # grain has no types
    """An iterable of (PackedBatch, LoaderStats) over the lanes of a mixture."""

    def __init__(
        self,
        mixture: Mixture,
        maker: RecipeMaker,
        *,
        lanes: Sequence[int],
        shape: Shape,
        bins: int,
        decoder: Decoder,
        sharing: Sharing,
        ledger: Ledger,
        strict: bool,
        threads: int,
    ) -> None:
        """`lanes` are the rows of this host, some of which it may be `sharing` with others; `threads` make recipes."""
        super().__init__()
        self._mixture, self._maker = mixture, maker
        self._settings = _Settings(lanes, shape, bins, decoder, sharing, ledger, strict, threads)

    def __iter__(self) -> "_PackedBatchIterator":
        return _PackedBatchIterator(self._mixture, self._maker, self._settings)


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    """The state after a batch. It is taken after every batch, so it must be cheap."""

    weights: dict[str, float]
    lanes: dict[int, tuple[int, list[int], list[list[int]]]]  # next position, numbers used before, waiting samples
    skipped: dict[int, int]
    names: list[str]

    def __deepcopy__(self, memo: Any) -> "_Snapshot":
        return self  # it is never mutated

    def to_json(self) -> dict[str, Any]:
        """Plain data. Waiting samples are [rows waited, source, number]."""
        lanes = {
            str(v): {
                "next": k,
                "taken": dict(zip(self.names, taken, strict=True)),
                "waiting": [[waited, self.names[i], n] for waited, i, n in waiting],
                "skipped": self.skipped[v],
            }
            for v, (k, taken, waiting) in self.lanes.items()
        }
        return {"weights": self.weights, "lanes": lanes}


@dataclasses.dataclass(frozen=True)
class _Begun:
    """A batch whose media are being decoded."""

    rows: list[list[Recipe]]
    indices: list[list[SampleIndex]]
    asked: list[list[list[Asked]]]  # indexed by row, sample, medium
    snapshot: _Snapshot


class _PackedBatchIterator(grain.DatasetIterator):  # type: ignore[misc]
    """Packs rows ahead of the decoders; the state is that of the batch handed out last."""

    def __init__(self, mixture: Mixture, maker: RecipeMaker, settings: _Settings) -> None:
        super().__init__()
        self._mixture, self._maker, self._settings = mixture, maker, settings
        self._pool = ThreadPoolExecutor(min(settings.threads, 4), "recipe") if settings.threads else None
        frames = max((settings.sharing.frames_here(row, settings.shape.frames) for row in settings.lanes), default=0)
        row_bytes = frames * settings.shape.image_size**2 * 3
        self._ahead = batches_ahead(settings.threads, len(settings.lanes), row_bytes) if settings.threads else 1
        self._begin_anew({v: Lane(mixture, v) for v in settings.lanes}, {}, dict.fromkeys(settings.lanes, 0))

    def _begin_anew(
        self, lanes: dict[int, Lane], waiting: dict[int, list[tuple[int, PackItem]]], skipped: dict[int, int]
    ) -> None:
        s = self._settings
        each = -(-_RECIPES_AHEAD // len(lanes))
        self._feeds = {}
        for v, lane in lanes.items():
            packer = Packer(s.shape.tokens, s.shape.frames, s.bins)
            packer.restore(waiting.get(v, []))
            self._feeds[v] = LaneFeed(lane, self._maker, packer, self._pool, each)
        self._begun: collections.deque[_Begun] = collections.deque()
        self._skipped = skipped  # by lane, up to the batch packed last
        self._lost = dict.fromkeys(lanes, 0)  # samples of batches handed out that could not be decoded
        self._in_vain = {"recipe": 0, "decode": 0}  # samples skipped since the last one that passed the stage
        s.sharing.begin_anew()
        self._state = self._snapshot()

    # ------------------------------------------------------------------------------ batches

    def __next__(self) -> tuple[PackedBatch, LoaderStats]:
        while len(self._begun) < self._ahead:
            self._begun.append(self._begin())
        return self._finish(self._begun.popleft())

    def _begin(self) -> _Begun:
        """Fill a row of each lane and ask for its media."""
        s = self._settings
        rows = [self._next_row(v, feed) for v, feed in self._feeds.items()]
        recipes = [[item.recipe for item in row] for row in rows]
        asked = [
            [
                s.sharing.ask(v, first, recipe.media, s.decoder, s.shape.image_size)
                for recipe, first in zip(row, first_frames(row), strict=True)
            ]
            for v, row in zip(s.lanes, recipes, strict=True)
        ]
        return _Begun(recipes, [[item.index for item in row] for row in rows], asked, self._snapshot())

    def _next_row(self, lane: int, feed: LaneFeed) -> list[PackItem]:
        while True:
            index, recipe = feed.take()
            if isinstance(recipe, Unusable):
                self._skipped[lane] += 1
                self._skip(index, recipe.id, recipe.path, recipe.reason, "recipe")
                continue
            self._in_vain["recipe"] = 0
            row = feed.packer.add(PackItem(index, recipe))
            if row is not None:
                return row

    def _finish(self, begun: _Begun) -> tuple[PackedBatch, LoaderStats]:
        """Wait for the media and lay out the arrays."""
        s = self._settings
        clips: list[list[list[Clip] | None]] = []
        used: list[Recipe] = []
        sources: collections.Counter[tuple[str, str]] = collections.Counter()
        decoded = self._decoded(begun)
        for v, row, indices in zip(s.lanes, begun.rows, begun.indices, strict=True):
            clips.append([])
            outcomes = iter(decoded[v])
            for recipe, index in zip(row, indices, strict=True):
                outcome = clips_of([next(outcomes) for _ in recipe.media])
                if isinstance(outcome, UserError):
                    self._lost[v] += 1
                    self._skip(index, recipe.id, path_in(str(outcome), recipe.media), str(outcome), "decode")
                    clips[-1].append(None)
                    continue
                self._in_vain["decode"] = 0
                used.append(recipe)
                sources[self._mixture.sources[index[0]].name, recipe.language] += 1
                clips[-1].append(outcome)
        skipped = {v: count + self._lost[v] for v, count in begun.snapshot.skipped.items()}
        self._state = dataclasses.replace(begun.snapshot, skipped=skipped)
        stats = LoaderStats(
            samples=len(used),
            tokens=sum(len(recipe.tokens) for recipe in used),
            frames=sum(recipe.frames for recipe in used),
            skipped=sum(skipped.values()),
            sample_ids=tuple(recipe.id for recipe in used),
            token_capacity=len(s.lanes) * s.shape.tokens,
            frame_capacity=len(s.lanes) * s.shape.frames,
            sources=_summed(sources, 0),
            languages=_summed(sources, 1),
            by_both={f"{source}/{language}": count for (source, language), count in sources.items()},
            rows=tuple(
                tuple(
                    f"{self._mixture.sources[index[0]].name}/{recipe.language}"
                    for recipe, index in zip(row, indices, strict=True)
                )
                for row, indices in zip(begun.rows, begun.indices, strict=True)
            ),
        )
        return assemble(begun.rows, clips, s.shape), stats

    def _decoded(self, begun: _Begun) -> dict[int, list[Outcome]]:
        """What was decoded of the media of each lane's row, as all hosts that have the row say."""
        s, sources = self._settings, self._mixture.sources
        rows = {
            v: (repr([(sources[i].name, number) for i, number in indices]), [one for sample in asked for one in sample])
            for v, indices, asked in zip(s.lanes, begun.indices, begun.asked, strict=True)
        }
        return s.sharing.settle(rows, s.decoder, s.shape.image_size)

    def _skip(self, index: SampleIndex, sample_id: str, path: str, reason: str, stage: str) -> None:
        s = self._settings
        s.ledger.add((self._mixture.sources[index[0]].name, index[1]), sample_id, path, reason, stage)
        if s.strict:
            raise UserError(f"sample {sample_id!r}: {reason} (config.data.strict)")
        self._in_vain[stage] += 1
        epoch = self._mixture.epoch
        if self._in_vain[stage] >= max(2 * epoch, min(20 * epoch, 10_000)):  # a lane gets only a part of an epoch
            where = f"; see {s.ledger.path}" if s.ledger.path else ""
            raise UserError(f"none of the {epoch} samples can be used, the last because: {reason}{where}")

    # -------------------------------------------------------------------------------- state

    def _snapshot(self) -> _Snapshot:
        names = [source.name for source in self._mixture.sources]
        return _Snapshot(
            weights=dict(zip(names, self._mixture.shares.tolist(), strict=True)),
            lanes={v: (f.lane.next, f.lane.taken, f.packer.state()) for v, f in self._feeds.items()},
            skipped=dict(self._skipped),
            names=names,
        )

    def get_state(self) -> dict[str, Any]:
        """See `grain.DatasetIterator`."""
        return {"snapshot": self._state}

    def set_state(self, state: dict[str, Any]) -> None:
        """See `grain.DatasetIterator`; waiting samples are made again."""
        snapshot = state["snapshot"]
        values = snapshot.to_json() if isinstance(snapshot, _Snapshot) else snapshot
        lanes, skipped, waiting = {}, {}, {}
        for v in self._settings.lanes:
            saved = values["lanes"].get(str(v))
            if saved is None:
                have = ", ".join(values["lanes"])
                raise UserError(f"saved data position: has rows {have}, not row {v}; merge the states of all hosts")
            lanes[v], skipped[v] = self._restored_lane(v, saved, values["weights"]), saved["skipped"]
            waiting[v] = saved["waiting"]
        self._begin_anew(lanes, self._made_again(waiting), skipped)

    def _restored_lane(self, v: int, saved: dict[str, Any], weights: dict[str, float]) -> Lane:
        """A lane at its saved position; if the shares changed, positions count anew after all numbers used so far."""
        sources, shares = self._mixture.sources, self._mixture.shares
        lane = Lane(self._mixture, v)
        same = {source.name: share for source, share in zip(sources, shares.tolist(), strict=True)} == weights
        lane.taken = [saved["taken"].get(source.name, 0) for source in sources]
        if same:
            lane.next = saved["next"]
            return lane
        before = [source for source in sources if source.name in weights]
        old = Lane(_with_weights(self._mixture, [weights[source.name] for source in before], before), v)
        old.taken = [saved["taken"][source.name] for source in before]
        used = dict(zip([source.name for source in before], old.used(saved["next"]), strict=True))
        lane.taken = [used.get(source.name, 0) for source in sources]
        return lane

    def _made_again(self, waiting: dict[int, list[list[Any]]]) -> dict[int, list[tuple[int, PackItem]]]:
        """The recipes of waiting samples; a sample that can no longer be read is skipped, as it would be later."""
        numbers = {source.name: i for i, source in enumerate(self._mixture.sources)}
        indices = [(v, w, (numbers[name], n)) for v, items in waiting.items() for w, name, n in items]
        wanted = [index for _, _, index in indices]
        made: Iterator[Made] = self._pool.map(self._maker, wanted) if self._pool else map(self._maker, wanted)
        again: dict[int, list[tuple[int, PackItem]]] = {v: [] for v in waiting}
        for (v, waited, index), recipe in zip(indices, made, strict=True):
            if isinstance(recipe, Unusable):
                self._skip(index, recipe.id, recipe.path, recipe.reason, "recipe")
            else:
                again[v].append((waited, PackItem(index, recipe)))
        return again

    def close(self) -> None:
        """See `grain.DatasetIterator`."""
        super().close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._settings.decoder.close()


def _with_weights(mixture: Mixture, weights: Sequence[float], sources: Sequence[Source]) -> Mixture:
    """The mixture with other sources and weights."""
    old = [dataclasses.replace(source, weight=weight) for source, weight in zip(sources, weights, strict=True)]
    return Mixture(old, mixture.seed, mixture.lanes)


def _summed(counts: Mapping[tuple[str, str], int], which: int) -> dict[str, int]:
    sums: collections.Counter[str] = collections.Counter()
    for key, count in counts.items():
        sums[key[which]] += count
    return dict(sums)


def clips_of(outcomes: Sequence[Outcome]) -> list[Clip] | UserError:
    """All clips of a sample, or its first error."""
    for outcome in outcomes:
        if isinstance(outcome, UserError):
            return outcome
    return [outcome for outcome in outcomes if isinstance(outcome, Clip)]
