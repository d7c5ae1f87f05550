"""`kangaroo instruct`."""

from pathlib import Path

from kangaroo_jax.cli.arguments import Overrides


def instruct(
    *, input: str, output: str = "", config: str = "instruct", dry_run: bool = False, overrides: Overrides = ()
) -> None:
    """Make an instruction set from captions.

        kangaroo instruct --input=curated/refined.jsonl --dry-run

    Every key of the config is a flag, --config.KEY=VALUE: --config.backends.writer.model=SOME/LLM.

    Args:
        input: captions.jsonl or refined.jsonl, as kangaroo annotate writes them
        output: folder for instruct.jsonl; by default that of --input
        config: FILE[:PRESET], such as configs/instruct.py:captions
        dry_run: only estimate calls, tokens and cost
    """
    from kangaroo_jax.cli.overrides import config_of

    settings = config_of("instruct", config, overrides)

    from kangaroo_jax.curation.instruct.run import make_instructions

    make_instructions(Path(input), Path(output) if output else Path(input).parent, settings, dry_run=dry_run)


COMMANDS = {"": instruct}
