"""`kangaroo quickstart`."""

from pathlib import Path

from kangaroo_jax.cli.arguments import Natural, Scale


def quickstart(
    *, workdir: str = "runs/quickstart", scale: Scale = 1.0, seed: Natural = 0, ablate: bool = False
) -> None:
    """Train a tiny Kangaroo from nothing, in minutes on a CPU.

        kangaroo quickstart --workdir=runs/quickstart --scale=0.1

    Args:
        workdir: folder for everything; run again to go on
        scale: share of the corpus and of the steps
        seed: seed of the corpus, the weights and the order of samples
        ablate: also train without each part of the design, and compare
    """
    from kangaroo_jax.system.files import make_folder

    folder = make_folder(Path(workdir))

    from kangaroo_jax.quickstart import run

    run.run(folder, seed=seed, scale=scale, ablate=ablate)


COMMANDS = {"": quickstart}
