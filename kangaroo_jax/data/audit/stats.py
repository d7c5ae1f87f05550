"""Statistics of a dataset, and how full its packs would be in each stage."""

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kangaroo_jax.config import STAGES, StageConfig, frames_per_group, tokens_per_group
from kangaroo_jax.data.annotations.conversation import Conversation
from kangaroo_jax.data.batches.mixture import Source
from kangaroo_jax.data.batches.packing import Packer, PackItem
from kangaroo_jax.data.batches.sample import Recipe, make_recipe
from kangaroo_jax.data.media.video import probe_cached
from kangaroo_jax.data.tokenizer import Tokenizer
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.files import write_json
from kangaroo_jax.system.installing import install_line

_OFFLINE = 10_000  # samples packed offline for comparison, whose time is quadratic
_QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


def write_stats(
    sources: Sequence[Source], config: StageConfig, tokenizer: Tokenizer, folder: Path, *, limit: int
) -> dict[str, Any]:
    """Write `stats.json` and `stats.png`; returns the contents of the first.

    Args:
        sources: the data.
        config: a stage's config, by which tokens and frames are counted.
        tokenizer: counts the tokens.
        folder: receives both files.
        limit: the number of samples to read, evenly spaced.

    Raises:
        UserError: nothing can be read.
    """
    total = sum(source.count for source in sources)
    chosen = np.unique(np.linspace(0, total - 1, min(limit, total)).round().astype(int))
    indices = [(source, n) for source in sources for n in range(source.count)]
    found = [indices[i][0].file.look_at(indices[i][0].sample(indices[i][1])) for i in chosen]
    conversations = [one for one in found if not isinstance(one, UserError)]
    recipes, skipped = _recipes(conversations, config, tokenizer)
    skipped += len(found) - len(conversations)
    if not recipes:
        raise UserError(f"none of {len(found)} samples can be used; kangaroo data check says why")
    seconds = [s for conversation in conversations for s in _seconds_of(conversation)]
    values = {
        "tokens": [len(recipe.tokens) for recipe in recipes],
        "text_tokens": [int((~recipe.is_vision).sum()) for recipe in recipes],
        "learnt_tokens": [int((recipe.weights > 0).sum()) for recipe in recipes],
        "frames": [recipe.frames for recipe in recipes],
        "rounds": [sum(t.role == "assistant" for t in conversation.turns) for conversation in conversations],
        "video_seconds": seconds,
    }
    result: dict[str, Any] = {
        "samples": total,
        "looked_at": len(found),
        "skipped": skipped,
        "sources": {source.name: source.count for source in sources},
        "languages": dict(collections.Counter(recipe.language for recipe in recipes).most_common()),
        "media": dict(collections.Counter(m.kind for c in conversations for m in c.media).most_common()),
        "distributions": {name: _summary(numbers) for name, numbers in values.items() if numbers},
        "packing": {},
    }
    for stage in STAGES:
        result["packing"][stage] = packing_of(
            conversations, StageConfig.load(f"{stage}:{config.model.preset}"), tokenizer
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "stats.json", result)
    _plot(values, result["packing"], folder / "stats.png")
    return result


def _recipes(
    conversations: Sequence[Conversation], config: StageConfig, tokenizer: Tokenizer
) -> tuple[list[Recipe], int]:
    """The recipes of a stage, and the number of samples without one."""
    sizes = frames_per_group(config.model), tokens_per_group(config.model, config.data.image_size)
    recipes = []
    for conversation in conversations:
        try:
            recipes.append(make_recipe(conversation, tokenizer, config.data, *sizes))
        except UserError:
            continue
    return recipes, len(conversations) - len(recipes)


def packing_of(conversations: Sequence[Conversation], config: StageConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """How full a stage's packs would be, and the number of tokens that suits the frames of a pack."""
    recipes, skipped = _recipes(conversations, config, tokenizer)
    if not recipes:
        return {"skipped": skipped}
    data = config.data
    tokens = np.array([len(recipe.tokens) for recipe in recipes])
    frames = np.array([recipe.frames for recipe in recipes])
    result = {"skipped": skipped, **fullness(recipes, data.tokens_per_pack, data.frames_per_pack, data.packing_bins)}
    if frames.any() and data.frames_per_pack:
        fitting = tokens.sum() / frames.sum() * data.frames_per_pack
        result["tokens_per_pack_that_fit"] = int(-(-fitting // 128) * 128)
    return result


class Measured(Protocol):
    """The attributes of a sample that packing reads: a recipe, or `Sizes`."""

    @property
    def id(self) -> str: ...

    @property
    def tokens(self) -> Any: ...

    @property
    def frames(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A synthetic sample with sizes only: `tokens` has the right length."""

    id: str
    tokens: range
    frames: int


def fullness(samples: Sequence[Measured], tokens: int, frames: int, bins: int, *, again: int = 4) -> dict[str, Any]:
    """The useful shares of packed rows.

    Args:
        samples: drawn at random, `again` times each on average (at least 2000 in all).
        tokens, frames: what a row holds.
        bins: see `Packer`.

    Returns:
        useful_tokens and useful_frames for the rows that the packer fills; offline_* for rows filled by the better of
        first-fit and best-fit decreasing over all the samples drawn (at most _OFFLINE); *_at_most, an upper bound for
        any packing, if samples could be cut anywhere; samples_per_pack.
    """
    limits = np.array([tokens, max(frames, 1)], np.int64)
    packer, rows = Packer(tokens, frames, bins), []
    order = np.random.default_rng(0).integers(0, len(samples), max(again * len(samples), 2000))
    for i in order:
        row = packer.add(PackItem((0, int(i)), samples[i]))
        if row is not None:
            rows.append([sum(len(item.recipe.tokens) for item in row), sum(item.recipe.frames for item in row)])
    shares = np.array(rows).mean(0) / limits if rows else np.zeros(2)
    need = np.array([[len(samples[i].tokens), samples[i].frames] for i in order], np.int64)
    least = np.ceil((need.sum(0) / limits).max())  # the fewest rows that can hold the sums
    some = need[:_OFFLINE]
    fewest = min(offline_rows(some, limits, best=best) for best in (False, True))
    result = {}
    for name, found in (
        ("useful_{}", shares),
        ("offline_{}", some.sum(0) / fewest / limits),
        ("{}_at_most", need.sum(0) / least / limits),
    ):
        for kind, share in zip(("tokens", "frames"), found, strict=True):
            result[name.format(kind)] = round(float(share), 4)
    return result | {"samples_per_pack": round(len(order) / max(len(rows), 1), 2)}


def offline_rows(needs: np.ndarray, limits: np.ndarray, *, best: bool) -> int:
    """The number of rows that first-fit decreasing (or best-fit decreasing) takes with all samples known beforehand.

    Args:
        needs: int64[n, 2], tokens and frames of each sample.
        limits: int64[2], what a row holds.
        best: choose the row with the least room left (shares of tokens and frames added), not the first that fits.
    """
    order = np.argsort(-(needs / limits).sum(1), kind="stable")
    room = np.repeat(limits[None], len(needs), axis=0)
    used = 0
    for need in needs[order]:
        fits = np.flatnonzero((room[:used] >= need).all(1))
        if len(fits) == 0:
            row = used
            used += 1
        else:
            row = int(fits[np.argmin((room[fits] / limits).sum(1))]) if best else int(fits[0])
        room[row] -= need
    return used


def _seconds_of(conversation: Conversation) -> list[float]:
    """The lengths in seconds of its readable videos."""
    seconds = []
    for medium in conversation.media:
        if medium.kind == "video" and not medium.frames:
            try:
                seconds.append(probe_cached(medium.path, "video").seconds)
            except UserError:
                continue
    return seconds


def _summary(numbers: Sequence[float]) -> dict[str, float]:
    quantiles = np.quantile(numbers, _QUANTILES)
    names = ("least", "p5", "median", "p95", "most")
    return {"mean": round(float(np.mean(numbers)), 2)} | {
        name: round(float(value), 2) for name, value in zip(names, quantiles, strict=True)
    }


def _plot(values: dict[str, list[float]], packing: dict[str, Any], path: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError(f"plotting the statistics needs the package matplotlib: {install_line('data')}") from None
    figure, axes = plt.subplots(2, 4, figsize=(16, 7), constrained_layout=True)
    for axis, (name, numbers) in zip(axes.flat, values.items(), strict=False):
        axis.hist(numbers, bins=40, color="#4e79a7")
        axis.set_title(name.replace("_", " "))
    axis = axes.flat[7]
    shares = {stage.split("_")[0]: entry for stage, entry in packing.items() if "useful_tokens" in entry}
    at = np.arange(len(shares))
    for offset, key, colour in ((-0.2, "useful_tokens", "#59a14f"), (0.2, "useful_frames", "#f28e2b")):
        axis.bar(at + offset, [100 * entry[key] for entry in shares.values()], 0.4, label=key, color=colour)
    axis.set_xticks(at, list(shares))
    axis.set_ylim(0, 100)
    axis.set_title("packs, % useful")
    axis.legend()
    axes.flat[6].axis("off")
    figure.savefig(path, dpi=80)
    plt.close(figure)
