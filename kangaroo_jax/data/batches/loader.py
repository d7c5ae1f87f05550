"""The Grain pipeline from annotation files to an endless stream of PackedBatches, in the order things happen.

    lanes: a row of the batch each, an order over all sources (mixture.py)
    -> recipe -> pack -> decode -> batch                       (PackedBatches below)
    -> prefetch in a thread                                    (grain)

A batch's content depends on the seed and the mixture alone. The state is small: the position of every lane and the
samples that wait to be packed. A restored loader goes on with exactly the batch that the old one would have given,
whatever the number of threads, processes or hosts.
"""

import dataclasses
import hashlib
import json
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain

from kangaroo_jax.config import DataConfig
from kangaroo_jax.conventions import PackedBatch
from kangaroo_jax.data.batches.feed import RecipeMaker
from kangaroo_jax.data.batches.ledger import Ledger
from kangaroo_jax.data.batches.mixture import Mixture, open_sources
from kangaroo_jax.data.batches.packing import Shape, assemble
from kangaroo_jax.data.batches.sample import Recipe
from kangaroo_jax.data.batches.sharing import Sharing
from kangaroo_jax.data.batches.stream import LoaderStats, PackedBatches
from kangaroo_jax.data.media.decode import TIME_LIMIT, Decoder, ThreadDecoder, make_decoder
from kangaroo_jax.data.media.download import Limits
from kangaroo_jax.data.media.storage import MediaCache, default_cache, use_cache
from kangaroo_jax.data.media.video import Clip
from kangaroo_jax.data.tokenizer import Tokenizer
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.cpus import usable_cpus

_PREFETCHED_BATCHES = 2


def make_loader(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    frames_per_group: int,
    tokens_per_group: int,
    seed: int,
    ledger: Ledger,
    rows: Sequence[int] | None = None,
    sharing: Sharing | None = None,
    num_threads: int | None = None,
) -> "Loader":
    """An endless iterator over (PackedBatch of numpy arrays, LoaderStats); see `Loader`.

    Args:
        config: `config.data`.
        tokenizer: ids of text and special tokens.
        frames_per_group: frames that the patchify joins; 1 where it is bypassed.
        tokens_per_group: vision tokens of such a group.
        seed: determines the order of the samples.
        ledger: where samples that cannot be used are entered.
        rows: the rows of every batch that this host needs; None is all of them. Each row's samples are the same
            whichever host reads it, and two hosts may read the same row.
        sharing: which of these rows other hosts have as well, and this host's frames of them; None where it decodes
            all frames of all its rows.
        num_threads: threads that decode and make recipes; by default one for each CPU that this process may
            use. 0 does all of it in the prefetching thread.

    Raises:
        UserError: an annotation file is missing or has a mistake, or sizes do not fit each other.
    """
    _check(config, frames_per_group)
    if num_threads is None:
        num_threads = usable_cpus()
    mixture, cache = open_mixture(config, seed)
    decoder = make_decoder(
        num_workers=config.num_workers,
        num_threads=num_threads,
        cache_mib=config.cache_mib,
        time_limit=config.decode_seconds or TIME_LIMIT,
        media_cache=cache,
    )
    shape = Shape(config.tokens_per_pack, config.frames_per_pack, config.image_size, frames_per_group, tokens_per_group)
    sharing = sharing or Sharing()
    batches = PackedBatches(
        mixture,
        RecipeMaker(mixture, tokenizer, config, frames_per_group, tokens_per_group, decoder),
        lanes=range(config.packs_per_batch) if rows is None else rows,
        shape=shape,
        bins=config.packing_bins,
        decoder=decoder,
        sharing=sharing,
        ledger=ledger,
        strict=config.strict,
        threads=num_threads,
    )
    identity = {
        "sources": mixture.identity(),
        "order": mixture.order(),
        "row": [*dataclasses.astuple(shape), config.packing_bins, config.packs_per_batch],
    }
    content = {
        source.file.path: digest for source in mixture.sources if (digest := sampled_digest(Path(source.file.path)))
    }
    return Loader(batches, identity, mixture, content, sharing)


def open_mixture(config: DataConfig, seed: int) -> tuple[Mixture, MediaCache]:
    """The sources of `config.data` and their order, and where media are fetched to. Raises UserError."""
    cache = _media_cache(config)
    use_cache(cache)  # before the sources are opened: annotations may be remote, too
    sources = open_sources(config.train, config.media_root, config.registry, config.weights)
    return Mixture(sources, seed, config.packs_per_batch, shuffle=config.shuffle), cache


# The keys behind the numbers of a saved "row", in order.
_ROW_KEYS = (
    "data.tokens_per_pack",
    "data.frames_per_pack",
    "data.image_size",
    "model.patchify (frames that are joined)",
    "model.patchify (tokens of joined frames)",
    "data.packing_bins",
    "data.packs_per_batch",
)
_DIGEST_PIECES, _DIGEST_BYTES = 64, 1 << 16


def sampled_digest(path: Path) -> str:
    """A digest of a file's size and of 64 pieces of 64 KiB of it, spread evenly; "" if it is not a file."""
    if not path.is_file():
        return ""
    size, digest = path.stat().st_size, hashlib.sha256()
    digest.update(str(size).encode())
    with path.open("rb") as file:
        for i in range(_DIGEST_PIECES):
            file.seek(max(i * _DIGEST_BYTES, i * (size - _DIGEST_BYTES) // (_DIGEST_PIECES - 1)))
            digest.update(file.read(_DIGEST_BYTES))
    return digest.hexdigest()


def _media_cache(config: DataConfig) -> MediaCache:
    """Where fetched media are kept, and within which limits they are fetched."""
    folder = Path(config.media_cache or default_cache().folder)
    limits = Limits(int(config.fetch_gib * (1 << 30)), config.fetch_seconds, config.allow_private)
    return MediaCache(folder, config.media_cache_gib << 30, limits)


def _check(config: DataConfig, frames_per_group: int) -> None:
    """Raise a UserError where keys of `config.data` do not fit each other."""
    if config.frames_per_pack % frames_per_group:
        raise UserError(
            f"config.data.frames_per_pack {config.frames_per_pack} must be a multiple of {frames_per_group}, "
            "the frames that the patchify joins"
        )


class Loader:
    """Endless batches with a state that can be saved and restored exactly. Use from one thread."""

    def __init__(
        self,
        batches: "PackedBatches",
        identity: dict[str, Any],
        mixture: Mixture,
        content: Mapping[str, str],
        sharing: Sharing,
    ) -> None:
        """A saved state must have the same `identity`; a different `content` is only reported."""
        self._identity, self._mixture, self._sharing = identity, mixture, sharing
        self._content, self._changed = dict(content), list[str]()
        prefetched = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=_PREFETCHED_BATCHES)
        self._open = [iter(prefetched)]
        weakref.finalize(self, _close_all, self._open, sharing)  # at exit too, before grain's modules are torn down

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> tuple[PackedBatch, LoaderStats]:
        """The next batch. Raises UserError where nothing can be read, or, if strict, at the first bad sample."""
        if not self._open:
            raise StopIteration
        found: tuple[PackedBatch, LoaderStats] = next(self._open[0])
        return found

    def describe(self) -> list[str]:
        """A line for each source: its detected format and its share of the samples."""
        mixed = len(self._mixture.sources) > 1
        return [
            source.file.describe()
            + (f"; {source.percent:g}%" if source.percent != 100 else "")
            + (f"; share {share:.1%} as {source.name!r}" if mixed else "")
            for source, share in zip(self._mixture.sources, self._mixture.shares, strict=True)
        ]

    def get_state(self) -> bytes:
        """The state after the last batch handed out, as JSON, without prefetched batches.

        In a run on several hosts it has this host's rows; `merge_states` joins those of all hosts.
        """
        position = self._open[0].get_state()["snapshot"].to_json()
        return json.dumps({**self._identity, "content": self._contents(), **position}).encode()

    def _contents(self) -> dict[str, str]:
        """The digest of each source by its name."""
        sources = self._mixture.sources
        return {source.name: self._content[source.file.path] for source in sources if source.file.path in self._content}

    def changed(self) -> list[str]:
        """A line for each source that `set_state` found edited since the state was saved."""
        return self._changed

    def set_state(self, state: bytes) -> None:
        """Go on after the batch at which `get_state` gave `state`; weights and the number of hosts may have changed.

        A source may have been added; one that is no longer wanted must stay, with weight 0.

        Raises:
            UserError: the state is of other data, another seed, other sizes, or lacks a row of this host.
        """
        values = json.loads(state)
        if isinstance(values.get("sources"), dict):
            self._mixture.keep_names(values["sources"])
            self._identity |= {"sources": self._mixture.identity(), "order": self._mixture.order()}
        for key, mine in self._identity.items():
            saved = values.get(key)
            if key == "sources" and isinstance(saved, dict):
                mine = {name: value for name, value in mine.items() if name in saved}
            if saved != mine:
                raise UserError(
                    f"saved data position: {_difference(key, saved, mine)}; "
                    "go on with the same data, or start in another workdir"
                )
        before, now = values.pop("content", {}), self._contents()
        self._changed = [
            f"{source.file.path} was edited since the last checkpoint, but has the same size: its new samples are used"
            for source in self._mixture.sources
            if before.get(source.name) and source.name in now and before[source.name] != now[source.name]
        ]
        self._sharing.stop()  # what is read ahead is of no use any more, and other hosts may not come to it
        self._open[0].set_state({"snapshot": values})

    def close(self) -> None:
        """Stop threads and processes; the loader cannot be used afterwards."""
        _close_all(self._open, self._sharing)


def _difference(key: str, saved: Any, mine: Any) -> str:
    """The differences between two values of an identity's part, by the config keys that they come from."""
    if key == "row" and isinstance(saved, list) and len(saved) == len(_ROW_KEYS):
        pairs = zip(_ROW_KEYS, saved, mine, strict=True)
        return ", ".join(f"config.{name} was {a} and is now {b}" for name, a, b in pairs if a != b)
    if key == "order" and isinstance(saved, dict) and saved.keys() == mine.keys() == {"seed"}:
        return f"config.seed was {saved['seed']} and is now {mine['seed']}"
    if key == "sources" and isinstance(saved, dict):
        lost = [f"config.data.train: {name} is missing" for name in saved if name not in mine]
        texts = "config.data.train: {} had {} samples in {} bytes and now has {} in {}"
        other = [texts.format(n, *saved[n], *mine[n]) for n in saved if n in mine and saved[n] != mine[n]]
        return ", ".join(lost + other)
    return f"{key} was {saved} and is now {mine}"


def merge_states(states: Sequence[bytes]) -> bytes:
    """Join the states that all hosts of a run gave after the same batch into one."""
    merged: dict[str, Any] = {}
    for state in states:
        values = json.loads(state)
        lanes = merged.get("lanes", {}) | values.pop("lanes")
        merged = {**values, "lanes": lanes}
    return json.dumps(merged).encode()


def _close_all(iterators: list[grain.DatasetIterator], sharing: Sharing) -> None:
    """Close and forget, without waiting for other hosts."""
    sharing.stop()
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
