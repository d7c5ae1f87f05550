"""A command run in this process."""

from pathlib import Path

from kangaroo_jax.cli import main as cli

ROOT = Path(__file__).parents[2]
TRAIN = ["train", "--config=stage3_refine:tiny"]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err
