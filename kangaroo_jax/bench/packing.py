"""`kangaroo bench packing`: how full rows get with synthetic samples of the paper's stages.

Beside the streaming packer's fullness stand two figures for the same samples: that of first-fit and best-fit
decreasing, which see all samples at once, and an upper bound for any packing. The table also has the cost of a useful
token: longer rows are fuller, but attention covers every token of the row.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kangaroo_jax.config import StageConfig, frames_per_group, tokens_per_group
from kangaroo_jax.data.audit.stats import Sizes, fullness
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.progress import Tell
from kangaroo_jax.training.flops import step_flops

STAGES = ("stage3_refine", "stage4_instruct", "stage5_long_video")
TEXT = (50, 1500)  # tokens of a caption or conversation
LONG_SHARE = 0.7  # share of long videos among the samples of a stage with a separate range for them
_COLUMNS = ("useful_tokens", "useful_frames", "offline_tokens", "offline_frames", "tokens_at_most", "frames_at_most")


def made_up(config: StageConfig, samples: int, text: str, seed: int = 0) -> list[Sizes]:
    """Synthetic samples of a stage: frames uniform in its ranges, text uniform or log-uniform in TEXT.

    Text is cut to the room that `max_sample_tokens` leaves, as in training.
    """
    data, rng = config.data, np.random.default_rng(seed)
    group, rows = frames_per_group(config.model), tokens_per_group(config.model, data.image_size)
    two_ranges = (data.long_min_frames, data.long_max_frames) != (data.min_frames, data.max_frames)
    found = []
    for i in range(samples):
        long = two_ranges and rng.random() < LONG_SHARE
        low, high = (data.long_min_frames, data.long_max_frames) if long else (data.min_frames, data.max_frames)
        frames = int(rng.integers(low // group, high // group + 1)) * group
        vision = frames // group * (rows + 1) + 2
        low, high = TEXT
        words = rng.integers(low, high + 1) if text == "uniform" else np.exp(rng.uniform(np.log(low), np.log(high)))
        found.append(Sizes(f"sample {i}", range(min(vision + int(words), data.max_sample_tokens)), frames))
    return found


def bench_packing(config: StageConfig, samples: int, text: str, seed: int = 0) -> dict[str, Any]:
    """The shares of `stats.fullness` for a stage's rows, and gflops_per_useful_token (of a causal train step)."""
    data = config.data
    found = fullness(
        made_up(config, samples, text, seed), data.tokens_per_pack, data.frames_per_pack, data.packing_bins, again=1
    )
    useful = data.packs_per_batch * data.tokens_per_pack * found["useful_tokens"]
    return found | {"gflops_per_useful_token": round(step_flops(config).causal / useful / 1e9, 1)}


def bench_rows(specs: Sequence[str], row: str, samples: int, seed: int, tell: Tell = print) -> list[dict[str, Any]]:
    """`bench_packing` with both kinds of text, for each STAGE:PRESET; without any for STAGES of the published model.

    `row` (TOKENSxFRAMES) replaces the config's row. STAGES whose samples do not fit into it are left out, with a
    printed line. Raises UserError.
    """
    results = []
    for spec in specs or [f"{stage}:kangaroo_8b" for stage in STAGES]:
        config = StageConfig.load(spec)
        if row:
            tokens, frames = _row(row)
            config = config.changed({"data.tokens_per_pack": tokens, "data.frames_per_pack": frames})
            if not specs and not _holds_a_sample(config):
                tell(f"{config.stage}: a sample may have {_most(config)}, which that row does not hold")
                continue
        for text in ("log-uniform", "uniform"):
            shape = f"{config.data.tokens_per_pack:,} / {config.data.frames_per_pack}"
            results.append(
                {"stage": config.stage, "row": shape, "text": text, **bench_packing(config, samples, text, seed)}
            )
    return results


def _most(config: StageConfig) -> str:
    data = config.data
    return f"{data.max_sample_tokens:,} tokens and {max(data.max_frames, data.long_max_frames)} frames"


def _holds_a_sample(config: StageConfig) -> bool:
    data = config.data
    frames = max(data.max_frames, data.long_max_frames)
    return data.max_sample_tokens <= data.tokens_per_pack and frames <= data.frames_per_pack


def _row(text: str) -> tuple[int, int]:
    try:
        tokens, frames = map(int, text.split("x"))
    except ValueError:
        raise UserError(f"bench packing: --row={text} must be TOKENSxFRAMES, such as 20480x144") from None
    return tokens, frames


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown; shares in percent, tokens and frames."""
    head = "stage | row | text | packed | offline | at most | GFLOP a useful token".split(" | ")
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    for found in results:
        shares = [f"{100 * found[name]:.1f}" for name in _COLUMNS]
        pairs = [f"{tokens} / {frames}" for tokens, frames in zip(shares[::2], shares[1::2], strict=True)]
        cells = [
            found["stage"].split("_")[0],
            found["row"],
            found["text"],
            *pairs,
            f"{found['gflops_per_useful_token']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
