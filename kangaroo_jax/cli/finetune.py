"""`kangaroo finetune`."""

from typing import Any

from kangaroo_jax.cli.arguments import CountOrNone, Natural, Overrides, Positive, PositiveOrNone, listed
from kangaroo_jax.errors import UserError


def finetune(
    *,
    base: str,
    data: str,
    workdir: str,
    replay: list[str] | None = None,
    held_out: str = "",
    dry_run: bool = False,
    epochs: PositiveOrNone = None,
    rank: Natural = 16,
    alpha: Positive = 32.0,
    targets: str = "",
    quantize: str = "",
    full: bool = False,
    keep_state: bool = False,
    freeze: list[str] | None = None,
    learning_rate: PositiveOrNone = None,
    packs: CountOrNone = None,
    frames: CountOrNone = None,
    patience: Natural = 3,
    columns: str = "",
    question: str = "",
    media_root: str = "",
    seed: Natural = 0,
    overrides: Overrides = (),
) -> None:
    """Teach a model your own videos: a table, a folder of labels, or any annotation file.

        kangaroo finetune --base=runs/base --data=mine.csv --workdir=runs/mine
        kangaroo chat --checkpoint=runs/mine
        kangaroo convert --from=runs/mine --to=export

    A fifth of the videos is held out and measured on the way; the best checkpoint is kept. Run the same command again
    to go on after an interruption. Keys of the config are flags, too: --config.KEY=VALUE.

    Args:
        base: folder of the model to start from
        data: table (CSV, TSV) with columns video, question, answer; or a folder whose sub-folders are labels; or JSON
        workdir: folder for the adapter, metrics, curves and the page of held-out answers
        replay: annotation file of what the model knows, half of all samples, several times for several; by default
            the base's own, where it is known
        held_out: data to measure on, in place of a fifth of --data
        dry_run: only say what it will need, warn, and draw the first batch
        epochs: passes over the data; by default 3, and of a tiny model at least 250 steps
        rank: of the adapter
        alpha: the adapter's scale times its rank
        targets: regular expression of the adapted linear maps; by default all of the decoder and the projector
        quantize: int8 or int4: how the decoder's frozen weights are held
        full: train the weights themselves, no adapter
        keep_state: keep the last checkpoint of a finished run, too, to go on from with more --epochs
        freeze: with --full, regular expression of parameters that stay as they are, several times for several
        learning_rate: at the peak; by default by the model's size
        packs: rows of a batch; by default 4, of a tiny model 2
        frames: most frames of a video; by default the base's, and at most 64
        patience: measurements without a better one before it stops; 0 never stops
        columns: names of the table's columns, such as question=Frage,answer=Antwort
        question: what is asked where the data has no question
        media_root: folder of the media that the data names; by default its own
        seed: of the split, the factors and the order of samples
    """
    from pathlib import Path

    from kangaroo_jax.cli.overrides import override
    from kangaroo_jax.config import stage_config

    if freeze and not full:
        raise UserError("finetune: --freeze is for --full; an adapter's base is frozen, and --targets says what adapts")
    pairs = [pair.partition("=") for pair in listed(columns)]
    if any(not (equals and name) for _, equals, name in pairs):
        raise UserError(f"finetune: --columns={columns}: give WHAT=NAME by commas, such as question=Frage")
    changes = override("finetune", stage_config("tiny").lock(), overrides)

    from kangaroo_jax.finetune.run import finetune as run
    from kangaroo_jax.finetune.settings import Wishes

    wishes = Wishes(
        rank=rank,
        alpha=alpha,
        targets=targets,
        quantize=quantize,
        full=full,
        keep_state=keep_state,
        freeze=tuple(freeze or ()),
        epochs=epochs or 0.0,
        learning_rate=learning_rate or 0.0,
        packs=packs or 0,
        frames=frames or 0,
        patience=patience,
        seed=seed,
    )
    options: dict[str, Any] = dict(question=question, media_root=media_root, dry_run=dry_run, overrides=changes)
    named = {what: name for what, _, name in pairs}
    run(base, data, Path(workdir), wishes=wishes, replay=replay or (), held_out=held_out, columns=named, **options)


COMMANDS = {"": finetune}
