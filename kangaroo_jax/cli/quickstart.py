"""`kangaroo quickstart`."""

from pathlib import Path
from typing import Literal

from kangaroo_jax.cli.arguments import Natural, Scale


def quickstart(
    *,
    workdir: str = "",
    recipe: Literal["tiny", "smol"] = "tiny",
    scale: Scale = 1.0,
    seed: Natural = 0,
    ablate: bool = False,
    dtype: Literal["", "float32", "bfloat16"] = "",
) -> None:
    """Train a small Kangaroo: a tiny one from nothing, in minutes on a CPU, or one with SmolLM2, in hours.

        kangaroo quickstart --workdir=runs/quickstart --scale=0.1

    Args:
        workdir: folder for everything; run again to go on; by default runs/quickstart, or runs/smol
        recipe: tiny trains its decoder, too; smol begins with SmolLM2-135M (docs/smol.md)
        scale: share of the corpus and of the steps
        seed: seed of the corpus, the weights and the order of samples
        ablate: also train without each part of the design, and compare
        dtype: what training computes in; bfloat16 is faster on a CPU that multiplies it (avx512_bf16, amx_bf16)
    """
    from kangaroo_jax.system.files import make_folder

    folder = make_folder(Path(workdir or ("runs/quickstart" if recipe == "tiny" else f"runs/{recipe}")))

    from kangaroo_jax.quickstart import run
    from kangaroo_jax.quickstart.recipe import RECIPES

    run.run(folder, recipe=RECIPES[recipe], seed=seed, scale=scale, ablate=ablate, dtype=dtype)


COMMANDS = {"": quickstart}
