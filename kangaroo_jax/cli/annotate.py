"""`kangaroo annotate`."""

from pathlib import Path

from kangaroo_jax.cli.arguments import Overrides


def annotate(
    *, input: str, output: str = "", config: str = "annotation", dry_run: bool = False, overrides: Overrides = ()
) -> None:
    """Caption clips by their key frames, with any models.

        kangaroo annotate --input=curated/selected.jsonl --dry-run

    Every key of the config is a flag, --config.KEY=VALUE: --config.backends.writer.model=SOME/MLLM.

    Args:
        input: JSONL of clips with key frames, as kangaroo curate select writes it
        output: folder for captions.jsonl, refined.jsonl; by default that of --input
        config: FILE[:PRESET], such as configs/annotation.py:endpoint
        dry_run: only estimate calls, tokens and cost
    """
    from kangaroo_jax.cli.overrides import config_of

    settings = config_of("annotate", config, overrides)

    from kangaroo_jax.curation.annotate.run import annotate_clips

    annotate_clips(Path(input), Path(output) if output else Path(input).parent, settings, dry_run=dry_run)


COMMANDS = {"": annotate}
