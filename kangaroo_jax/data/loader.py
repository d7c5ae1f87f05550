"""The Grain pipeline, in the order things happen: from annotation files to PackedBatches, without end.

    index, shuffled anew each epoch, without end -> this host's share      (grain, random access)
    -> recipe -> pack -> decode -> batch                                   (PackedBatches below)
    -> prefetch in a thread                                                (grain)

The order is a function of the seed alone. The state is the next place in the shuffled stream and the
places of the samples in open rows, so that it stays small, and a restored loader goes on with the very
batch that the old one would have given, whatever the number of threads or processes.
"""

import bisect
import dataclasses
import json
import os
import weakref
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from kangaroo_jax.conventions import PackedBatch, UserError
from kangaroo_jax.data.conversation import AnnotationFile, Conversation
from kangaroo_jax.data.decode import Decoder, ThreadDecoder, make_decoder
from kangaroo_jax.data.ledger import Ledger
from kangaroo_jax.data.packing import Packer, Placed, Shape, assemble
from kangaroo_jax.data.sample import Recipe, make_recipe
from kangaroo_jax.data.shuffle import EndlessOrder, EndlessShuffle
from kangaroo_jax.data.tokenizer import Tokenizer
from kangaroo_jax.data.video import Clip

_PREFETCHED_BATCHES = 2
_PREFETCHED_RECIPES = 64


@dataclasses.dataclass(frozen=True)
class LoaderStats:
    """What is in a batch: samples, tokens and frames in use; `skipped` counts from the start of the stream."""

    samples: int
    tokens: int
    frames: int
    skipped: int
    sample_ids: tuple[str, ...]


def make_loader(
    config: ConfigDict,
    tokenizer: Tokenizer,
    *,
    frames_per_group: int,
    tokens_per_group: int,
    seed: int,
    ledger: Ledger,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
) -> "Loader":
    """An endless iterator over (PackedBatch of numpy arrays, LoaderStats); see `Loader`.

    Args:
        config: `config.data`.
        tokenizer: ids of text and special tokens.
        frames_per_group: frames that the patchify joins; 1 where it is bypassed.
        tokens_per_group: vision tokens of such a group.
        seed: of the order of the samples.
        ledger: where samples that cannot be used are entered.
        process_index, process_count: this host among all; each takes its share of every batch.
        num_threads: that decode, and that make recipes; by default the CPU's cores, at most 8. 0 does all
            in the prefetching thread.

    Raises:
        UserError: an annotation file is missing or has a mistake, or sizes do not fit each other.
    """
    _check(config, frames_per_group, process_count)
    if num_threads is None:
        num_threads = min(8, os.cpu_count() or 1)
    files = _Annotations(config.train, config.media_root)
    order = EndlessShuffle(len(files), seed) if config.shuffle else EndlessOrder(len(files))
    stream = grain.MapDataset.source(order)[process_index::process_count]
    recipes = stream.map(_RecipeMaker(files, tokenizer, config, frames_per_group, tokens_per_group))
    shape = Shape(config.tokens_per_pack, config.frames_per_pack, config.image_size, frames_per_group, tokens_per_group)
    batches = PackedBatches(
        recipes,
        rows=config.packs_per_batch // process_count,
        shape=shape,
        bins=config.packing_bins,
        decoder=make_decoder(num_workers=config.num_workers, num_threads=num_threads, cache_mib=config.cache_mib),
        ledger=ledger,
        strict=config.strict,
        epoch=-(-len(files) // process_count),
        recipe_threads=min(num_threads, 4),
    )
    identity = {
        "samples": len(files),
        "bytes": sum(os.path.getsize(path) for path in config.train),
        "seed": seed,
        "process": [process_index, process_count],
        "row": [*dataclasses.astuple(shape), config.packing_bins],
    }
    return Loader(batches, identity)


def _check(config: ConfigDict, frames_per_group: int, process_count: int) -> None:
    """Raise a UserError where keys of `config.data` do not fit each other or the mesh."""
    if not config.train:
        raise UserError("config.data.train is empty: name at least one annotation file (LLaVA JSON or JSONL)")
    if config.packs_per_batch % process_count:
        raise UserError(
            f"config.data.packs_per_batch {config.packs_per_batch} must be a multiple of {process_count} processes"
        )
    if config.frames_per_pack % frames_per_group:
        raise UserError(
            f"config.data.frames_per_pack {config.frames_per_pack} must be a multiple of {frames_per_group}, "
            "the frames that the patchify joins"
        )


class Loader:
    """Endless batches with a state that can be saved and restored exactly. Use from one thread."""

    def __init__(self, batches: "PackedBatches", identity: dict[str, Any]) -> None:
        """`identity`: what must be the same where a state is restored."""
        self._identity = identity
        prefetched = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=_PREFETCHED_BATCHES)
        self._open = [iter(prefetched)]
        weakref.finalize(self, _close_all, self._open)  # at exit too, while grain's modules still stand

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> tuple[PackedBatch, LoaderStats]:
        """The next batch. Raises UserError where nothing can be read, or, if strict, at the first bad sample."""
        if not self._open:
            raise StopIteration
        return next(self._open[0])

    def get_state(self) -> bytes:
        """The state after the last batch handed out, as JSON; what has been prefetched is not in it."""
        return json.dumps({**self._identity, **self._open[0].get_state()}).encode()

    def set_state(self, state: bytes) -> None:
        """Go on after the batch at which `get_state` gave `state`.

        Raises:
            UserError: the state is of other data, another seed, other sizes or another number of processes.
        """
        values = json.loads(state)
        for key, mine in self._identity.items():
            if (saved := values.pop(key, None)) != mine:
                raise UserError(
                    f"saved data position: {key} was {saved} and is now {mine}; "
                    "go on with the same data, or start in another workdir"
                )
        self._open[0].set_state(values)

    def close(self) -> None:
        """Stop threads and processes; the loader ends here."""
        _close_all(self._open)


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
    """Close and forget."""
    while iterators:
        iterators.pop().close()


def batch_from_recipes(
    recipes: Sequence[Recipe],
    *,
    tokens: int,
    frames: int,
    image_size: int,
    num_threads: int = 0,
) -> PackedBatch:
    """One recipe a row, padded on the right: for evaluation and chat. B = len(recipes), T = `tokens`, F = `frames`.

    Raises:
        UserError: a recipe is larger than a row, or one of its files cannot be decoded.
    """
    if not recipes:
        raise ValueError("batch_from_recipes needs at least one recipe")
    shape = Shape(tokens, frames, image_size, recipes[0].frames_per_group, recipes[0].tokens_per_group)
    for recipe in recipes:
        if len(recipe.tokens) > tokens or recipe.frames > frames:
            raise UserError(
                f"sample {recipe.id!r}: {len(recipe.tokens)} tokens and {recipe.frames} frames, "
                f"but there is room for {tokens} and {frames}"
            )
    decoder = ThreadDecoder(num_threads)
    try:
        decoded = decode_recipes(recipes, decoder, image_size)
    finally:
        decoder.close()
    clips = []
    for outcome in decoded:
        if isinstance(outcome, UserError):
            raise outcome
        clips.append([outcome])
    return assemble([[recipe] for recipe in recipes], clips, shape)


def decode_recipes(recipes: Sequence[Recipe], decoder: Decoder, image_size: int) -> list[list[Clip] | UserError]:
    """The clips of each recipe, or its first error."""
    outcomes = iter(decoder.decode([ref for recipe in recipes for ref in recipe.media], image_size))
    results: list[list[Clip] | UserError] = []
    for recipe in recipes:
        mine = [next(outcomes) for _ in recipe.media]
        errors = [outcome for outcome in mine if isinstance(outcome, UserError)]
        results.append(errors[0] if errors else [clip for clip in mine if isinstance(clip, Clip)])
    return results


# ------------------------------------------------------------------------- index and recipe


class _Annotations:
    """Several annotation files as one list."""

    def __init__(self, paths: Sequence[str], media_root: str) -> None:
        self._files = [AnnotationFile(path, media_root) for path in paths]
        self._ends = np.cumsum([len(file) for file in self._files]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Conversation:
        file = bisect.bisect_right(self._ends, index)
        return self._files[file][index - (self._ends[file - 1] if file else 0)]


@dataclasses.dataclass(frozen=True)
class _Unusable:
    """A sample of which no recipe could be made."""

    id: str
    path: str
    reason: str


@dataclasses.dataclass(frozen=True)
class _RecipeMaker:
    """Index of a sample to its recipe."""

    files: _Annotations
    tokenizer: Tokenizer
    config: ConfigDict
    frames_per_group: int
    tokens_per_group: int

    def __call__(self, index: int) -> Recipe | _Unusable:
        conversation = self.files[index]
        try:
            return make_recipe(conversation, self.tokenizer, self.config, self.frames_per_group, self.tokens_per_group)
        except UserError as error:
            return _Unusable(conversation.id, _path_in(str(error), conversation.media), str(error))


def _path_in(reason: str, media: Sequence[Any]) -> str:
    return next((medium.path for medium in media if medium.path in reason), "")


# ------------------------------------------------------------------- pack, decode and batch


@dataclasses.dataclass(frozen=True)
class _Settings:
    """How `PackedBatches` packs and decodes."""

    rows: int
    shape: Shape
    bins: int
    decoder: Decoder
    ledger: Ledger
    strict: bool
    epoch: int
    recipe_threads: int


class PackedBatches(grain.IterDataset):
    """Recipes, by their place in an endless stream, to (PackedBatch, LoaderStats)."""

    def __init__(
        self,
        recipes: grain.MapDataset,
        *,
        rows: int,
        shape: Shape,
        bins: int,
        decoder: Decoder,
        ledger: Ledger,
        strict: bool,
        epoch: int,
        recipe_threads: int,
    ) -> None:
        """`rows` is B; `epoch` the samples after which the stream has seen all of them once."""
        super().__init__()
        self._recipes = recipes
        self._settings = _Settings(rows, shape, bins, decoder, ledger, strict, epoch, recipe_threads)

    def __iter__(self) -> "_PackedBatchIterator":
        return _PackedBatchIterator(self._recipes, self._settings)


class _PackedBatchIterator(grain.DatasetIterator):
    """State: the next place in the stream, the places in open rows, and how many samples were skipped."""

    def __init__(self, recipes: grain.MapDataset, settings: _Settings) -> None:
        threads = settings.recipe_threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_PREFETCHED_RECIPES if threads else 0)
        self._ordered = iter(recipes.to_iter_dataset(read_options=options))
        super().__init__()
        self._recipes, self._settings = recipes, settings
        self._packer = self._new_packer()
        self._next_place = 0
        self._skipped = 0
        self._in_vain = {"recipe": 0, "decode": 0}  # samples skipped since the last that passed that stage

    def _new_packer(self) -> Packer:
        s = self._settings
        return Packer(s.shape.tokens, s.shape.frames, s.bins)

    def __next__(self) -> tuple[PackedBatch, LoaderStats]:
        s = self._settings
        rows = [[item.recipe for item in self._next_row()] for _ in range(s.rows)]
        decoded = iter(decode_recipes([recipe for row in rows for recipe in row], s.decoder, s.shape.image_size))
        clips: list[list[list[Clip] | None]] = []
        used: list[Recipe] = []
        for row in rows:
            clips.append([])
            for recipe in row:
                outcome = next(decoded)
                if isinstance(outcome, UserError):
                    self._skip(recipe.id, _path_in(str(outcome), recipe.media), str(outcome), "decode")
                    clips[-1].append(None)
                else:
                    self._in_vain["decode"] = 0
                    used.append(recipe)
                    clips[-1].append(outcome)
        stats = LoaderStats(
            samples=len(used),
            tokens=sum(len(recipe.tokens) for recipe in used),
            frames=sum(recipe.frames for recipe in used),
            skipped=self._skipped,
            sample_ids=tuple(recipe.id for recipe in used),
        )
        return assemble(rows, clips, s.shape), stats

    def _next_row(self) -> list[Placed]:
        while True:
            recipe = next(self._ordered)
            place = self._next_place
            self._next_place += 1
            if isinstance(recipe, _Unusable):
                self._skip(recipe.id, recipe.path, recipe.reason, "recipe")
                continue
            self._in_vain["recipe"] = 0
            row = self._packer.add(Placed(place, recipe))
            if row is not None:
                return row

    def _skip(self, sample_id: str, path: str, reason: str, stage: str) -> None:
        s = self._settings
        s.ledger.add(sample_id, path, reason, stage)
        if s.strict:
            raise UserError(f"sample {sample_id!r}: {reason} (config.data.strict)")
        self._skipped += 1
        self._in_vain[stage] += 1
        if self._in_vain[stage] >= 2 * s.epoch:  # a run over two epochs' border may be nearly that long
            where = f"; see {s.ledger.path}" if s.ledger.path else ""
            raise UserError(f"none of the {s.epoch} samples can be used, the last because: {reason}{where}")

    def get_state(self) -> dict[str, Any]:
        """See `grain.DatasetIterator`; plain numbers and lists."""
        return {"next": self._next_place, "open": self._packer.state(), "skipped": self._skipped}

    def set_state(self, state: dict[str, Any]) -> None:
        """See `grain.DatasetIterator`; the samples of open rows are made again."""
        self._next_place = state["next"]
        self._skipped = state["skipped"]
        self._in_vain = dict.fromkeys(self._in_vain, 0)
        self._ordered.set_state({"next_index": self._next_place})
        rows = [(waited, [Placed(p, self._recipes[p]) for p in places]) for waited, *places in state["open"]]
        for _, items in rows:
            for item in items:
                if isinstance(item.recipe, _Unusable):
                    raise UserError(f"{item.recipe.reason} (it could be read before this run was interrupted)")
        self._packer = self._new_packer()
        self._packer.restore(rows)

    def close(self) -> None:
        """See `grain.DatasetIterator`."""
        super().close()
        self._ordered.close()
        self._settings.decoder.close()
