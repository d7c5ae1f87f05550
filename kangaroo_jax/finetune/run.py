"""From a table to a model that has learnt it: split, settings, foresight, training, and a page of held-out answers."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.config import StageConfig
from kangaroo_jax.conventions import PackedBatch
from kangaroo_jax.data.annotations.format_writing import to_record
from kangaroo_jax.data.annotations.sources import AnnotationFile
from kangaroo_jax.data.batches.ledger import Ledger
from kangaroo_jax.data.media.addresses import is_remote
from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.marking import MEDIA
from kangaroo_jax.evaluation.running import Loading, Settings, Share, evaluate_checkpoint
from kangaroo_jax.evaluation.while_training import BenchmarkEvaluator
from kangaroo_jax.finetune import foresight, workdirs
from kangaroo_jax.finetune.settings import Wishes, make_stage, with_steps
from kangaroo_jax.finetune.split import look_alikes, missing_labels, refuse_shared, split
from kangaroo_jax.finetune.table import Example, read_examples
from kangaroo_jax.finetune.wording import counted
from kangaroo_jax.models.parameters import abstract_model
from kangaroo_jax.planning.here import explained_memory
from kangaroo_jax.system.files import make_folder, write_text
from kangaroo_jax.system.progress import Tell, duration
from kangaroo_jax.training.check import check_config, check_trainable
from kangaroo_jax.training.epochs import draws_a_step
from kangaroo_jax.training.loop import open_loader, open_tokenizer, show_first_batch, train
from kangaroo_jax.training.metrics import read_metrics
from kangaroo_jax.training.rehearsal import rehearse
from kangaroo_jax.training.step import TrainStep

_LONGEST = 60  # characters of an answer that is scored by its text
Override = Mapping[str, Any]


def finetune(
    base: str,
    data: str,
    workdir: Path,
    *,
    wishes: Wishes,
    replay: Sequence[str] = (),
    held_out: str = "",
    columns: Mapping[str, str] | None = None,
    question: str = "",
    media_root: str = "",
    dry_run: bool = False,
    overrides: Override | None = None,
    tell: Tell = print,
) -> Path:
    """Fine-tune `base` on `data` in `workdir`, from where an earlier call was interrupted; returns the workdir.

    Args:
        base: folder of a checkpoint with a whole model.
        data: see `table.read_examples`.
        workdir: receives a run of training, data/, held_out/ (answers, results, report.html), and curves.png.
        wishes: settings that are not left to the command.
        replay: annotation files drawn as often as `data`; none takes the base's own, where they still are.
        held_out: data to measure on, in place of a part of `data`.
        columns, question, media_root: see `table.read_examples`.
        dry_run: stop before the training.
        overrides: keys of the stage's config.
        tell: prints a line.

    Raises:
        UserError: the data, the base or a setting is wrong, or the run needs more than there is.
    """
    options: dict[str, Any] = dict(columns=columns, question=question, media_root=media_root)
    workdirs.check_place(workdir, Path(base), (data, held_out), replay)
    examples = read_examples(data, tell, **options)
    if held_out:
        learnt, asked = examples, read_examples(held_out, tell, **options)
        refuse_shared(learnt, asked)
        for line in look_alikes(learnt, asked, tell):
            tell(f"warning: {line}")
    else:
        learnt, asked = split(examples, wishes.seed, tell)
    tell(f"{counted(len(learnt), 'example')} to learn from, {len(asked)} held out")
    for line in missing_labels(learnt, asked):
        tell(f"warning: {line}")
    scored = [e for e in asked if len(e.conversation.turns) == 2 and len(e.answer) <= _LONGEST]
    if remote := [e for e in scored if is_remote(e.video)]:
        tell(f"held-out videos that are addresses: {len(remote)}; the loss is measured, but nothing is asked of them")
        scored = [e for e in scored if not is_remote(e.video)]
    files = workdirs.files_of(workdir)
    texts = {name: text_of(e) for name, e in zip(files, (learnt, asked, scored), strict=True)}
    workdirs.check_run(workdir, texts)
    replay = tuple(replay) or _own_data(Path(base))
    questions = files["questions"] if scored else None
    config = make_stage(Path(base), files["train"], files["held_out"], questions, replay, wishes)
    if overrides:
        if "train.epochs" in overrides:
            raise UserError("finetune: --epochs counts passes over your examples; leave --config.train.epochs out")
        config.update_from_flattened_dict(dict(overrides))
    needs = _checked(config, replay, workdir)
    make_folder(make_folder(workdir) / "data")
    for name, text in texts.items():
        write_text(files[name], text)
    for line in foresight.of_base(reading.load_config(base), config, learnt):
        tell(f"warning: {line}")
    ready, batch = _foreseen(config, needs, learnt, asked, replay, workdir, wishes, overrides or {}, tell)
    with explained_memory(StageConfig.from_config(ready)):
        step_fn = None if workdirs.begun(workdir) else _timed(StageConfig.from_config(ready), batch, tell)
        if dry_run:
            tell(f"--dry-run: nothing is trained; look at {workdir / 'first_batch.png'}")
            return workdir
        train(ready, workdir, evaluator=BenchmarkEvaluator, step_fn=step_fn, tell=tell)
    write_curves(workdir, tell)
    if scored:
        settings = Settings((str(files["questions"]),), "")
        (result,) = evaluate_checkpoint(
            str(workdir), settings, make_folder(workdir / "held_out"), Loading(), Share(1, 1), tell=tell
        )
        if lost := result["protocols"]["strict"][MEDIA]:
            lead = "warning: held-out questions about clips that cannot be read, which count as wrong"
            tell(f"{lead}: {lost} of {len(scored)}")
    tell(f"done: kangaroo chat --checkpoint={workdir}, kangaroo convert --from={workdir} --to=EXPORT")
    return workdir


def _checked(config: ConfigDict, replay: Sequence[str], workdir: Path) -> foresight.Needs:
    """What the run needs. Raises UserError for settings and replay that cannot be, before anything is written."""
    stage = StageConfig.from_config(config)
    check_config(stage)
    check_trainable(stage, abstract_model(stage.model, stage.lora).shapes)
    for path in replay:
        AnnotationFile(path)
    needs = foresight.needs_of(stage, workdir)
    needs.check()
    return needs


def _foreseen(
    config: ConfigDict,
    needs: foresight.Needs,
    learnt: Sequence[Example],
    asked: Sequence[Example],
    replay: Sequence[str],
    workdir: Path,
    wishes: Wishes,
    overrides: Override,
    tell: Tell,
) -> tuple[ConfigDict, PackedBatch]:
    """(the config with its steps, the first batch), after what is needed and warnings were said. Raises UserError."""
    stage = StageConfig.from_config(config)
    tokenizer = open_tokenizer(stage)
    loader = open_loader(stage, tokenizer, Ledger(None), range(stage.data.packs_per_batch))
    batch, _ = next(loader)
    loader.close()
    show_first_batch(batch, tokenizer, workdir, tell)
    mine = draws_a_step(stage, tokenizer)[0] * (0.5 if replay else 1.0)
    with_steps(config, len(learnt), mine, wishes.epochs)
    config.update_from_flattened_dict(dict(overrides))
    stage = StageConfig.from_config(config)
    epochs = stage.train.steps * mine / len(learnt)
    steps, own = counted(stage.train.steps, "step"), counted(len(learnt), "example")
    tell(f"{steps}: {epochs:.1f} epochs over {own}, {mine:.1f} of them a step")
    tell(f"half of the samples are replayed from {', '.join(replay)}" if replay else "no replay")
    room = min(stage.data.max_sample_tokens, stage.data.tokens_per_pack)
    for line in foresight.warnings(learnt, asked, replay, tokenizer, stage.lora.rank > 0, room):
        tell(f"warning: {line}")
    for line in needs.lines():
        tell(line)
    return config, batch


def _timed(stage: StageConfig, batch: PackedBatch, tell: Tell) -> TrainStep:
    """The compiled step, after it was said how long all of them will take on the devices that are here."""
    step_fn, seconds = rehearse(stage, batch)
    tell(f"a step takes {seconds:.2f} s here: {stage.train.steps} take about {duration(seconds * stage.train.steps)}")
    return step_fn


def _own_data(base: Path) -> tuple[str, ...]:
    """The annotation files that the base was trained with, where they still are."""
    files = reading.load_config(base).data.train
    return tuple(files) if files and all(os.path.isfile(str(path)) for path in files) else ()


def text_of(examples: Sequence[Example]) -> str:
    """Lines of the examples as conversations of LLaVA's format, with the key that an evaluation reads."""
    lines = []
    for example in examples:
        try:
            record = to_record(example.conversation, "llava")
        except ValueError as error:
            raise UserError(f"{example.where}: {error}") from None
        scored: dict[str, Any] = {"options": list(example.options)} if example.options else {}
        scored["answer"] = example.letter if example.options else example.answer
        lines.append(json.dumps({**record, **scored}, ensure_ascii=False) + "\n")
    return "".join(lines)


def write_curves(workdir: Path, tell: Tell) -> None:
    """`curves.png`: the loss in training, and what was measured of the held-out part. Needs matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    lines = read_metrics(workdir / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line and "eval" not in line]
    measured = [(line["step"], line["eval"]) for line in lines if isinstance(line.get("eval"), dict)]
    figure, left = plt.subplots(figsize=(8, 4))
    left.plot([line["step"] for line in steps], [line["loss"] for line in steps], color="0.7", label="loss, training")
    losses = [(step, found["loss"]) for step, found in measured if "loss" in found]
    left.plot([step for step, _ in losses], [loss for _, loss in losses], "o-", label="loss, held out")
    left.set_xlabel("step")
    left.set_yscale("log")
    if any("questions" in found for _, found in measured):
        right = left.twinx()
        pairs = [(step, found["questions"]) for step, found in measured if "questions" in found]
        right.plot(*zip(*pairs, strict=True), "s--", color="C2", label="right answers, held out")
        right.set_ylim(0, 1)
        right.legend(loc="lower right")
    left.legend(loc="upper right")
    figure.savefig(workdir / "curves.png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    tell(f"curves: {workdir / 'curves.png'}")
