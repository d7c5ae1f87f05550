"""The training loop, top to bottom: mesh, model, data, state, records, steps."""

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from kangaroo_jax import machine
from kangaroo_jax.checkpoints import reading
from kangaroo_jax.chips import Chip, find_chip
from kangaroo_jax.config import PRESETS, StageConfig, frames_per_group, model_config, to_plain, tokens_per_group
from kangaroo_jax.conventions import PackedBatch
from kangaroo_jax.data.batches.held_out import HeldOutBatches
from kangaroo_jax.data.batches.ledger import Ledger
from kangaroo_jax.data.batches.loader import Loader, make_loader
from kangaroo_jax.data.batches.preview import batch_tree, save_picture
from kangaroo_jax.data.batches.sharing import Sharing
from kangaroo_jax.data.tokenizer import Tokenizer, load_tokenizer
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.parameters import Binding, abstract_model
from kangaroo_jax.sharding import make_mesh, mesh_scope, mesh_text
from kangaroo_jax.system.files import write_json
from kangaroo_jax.system.json_text import json_line
from kangaroo_jax.system.memory import keep_freed_memory
from kangaroo_jax.system.progress import Tell, duration, silent
from kangaroo_jax.training import checkpoint
from kangaroo_jax.training.base import adapter_state, load_base
from kangaroo_jax.training.boards import open_boards
from kangaroo_jax.training.check import check_config, check_trainable
from kangaroo_jax.training.distributed import Watchdog, barrier, explained, is_main
from kangaroo_jax.training.epochs import with_epochs
from kangaroo_jax.training.finishing import finish_adapter, finished
from kangaroo_jax.training.host_rows import HostRows
from kangaroo_jax.training.initial import initial_state
from kangaroo_jax.training.loss_by import LossBySource
from kangaroo_jax.training.measuring import Evaluator, HeldOutLoss, MakeEvaluator, Measuring
from kangaroo_jax.training.metrics import MetricLog, SampleLog, StepLine, drop_after, number, read_metrics
from kangaroo_jax.training.observe import Observer
from kangaroo_jax.training.optimizer import count
from kangaroo_jax.training.placement import resolve
from kangaroo_jax.training.reporting import Pending, Reporter, of_host
from kangaroo_jax.training.resume import check_resume, check_tokenizer
from kangaroo_jax.training.saving import Saver
from kangaroo_jax.training.state import abstract_state, build_step
from kangaroo_jax.training.step import TokenLosses, TrainState, TrainStep, make_loss, make_token_losses
from kangaroo_jax.training.stopping import Preemption, explained_disk, locked, unbroken


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a stage."""

    stage_dir: Path
    steps: int
    seconds: float  # time of this process; a restarted stage counts from its restart
    useful_token_share: float  # tokens of samples over all token positions


@dataclasses.dataclass(frozen=True)
class Records:
    """Where a stage's steps are written, as far as step `first`."""

    log: MetricLog
    samples: SampleLog
    first: int
    before: dict[str, float]  # from the steps until `first`: skipped_steps, and the times of `observe.Observer`


@dataclasses.dataclass
class StageRun:
    """A stage that is ready to go on after step `records.first`."""

    config: StageConfig  # resolved for these chips
    given: StageConfig  # which a run on other chips may resolve otherwise
    chip: Chip | None  # None if its peak is unknown
    mesh: Mesh
    tokenizer: Tokenizer
    ledger: Ledger
    rows: HostRows
    loader: Loader
    step_fn: TrainStep
    state: TrainState | None  # the first step takes it
    checkpoints: checkpoint.Checkpoints
    records: Records
    held_out: HeldOutLoss | None
    token_losses: TokenLosses | None  # where losses by source are asked for

    def take_state(self) -> TrainState:
        """The state, which is not kept here any longer: the first step reuses its memory."""
        state, self.state = self.state, None
        assert state is not None
        return state


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    evaluator: MakeEvaluator | None = None,
    step_fn: TrainStep | None = None,
    tell: Tell = print,
) -> Result:
    """Run one stage in `workdir`, from its last checkpoint if there is one, to the end of its steps or epochs.

    Args:
        config: a stage's config (`config.stage_config`).
        workdir: receives checkpoints, metrics.jsonl, samples.jsonl, ledger.jsonl, config.json, machine.jsonl and
            first_batch.{txt,png}.
        evaluator: makes what scores `config.eval.benchmarks`, if there are some.
        step_fn: the compiled step of this config, where there is one (`rehearsal.rehearse`).
        tell: prints a progress line.

    Raises:
        UserError: for missing files, invalid values, a tokenizer or checkpoint that does not fit, another run in
            `workdir`, a full disk, or (`reading.NotFinite`) a loss that is not finite.
        Preempted: SIGTERM, SIGHUP or Ctrl-C came; the state is saved, and the process should end with its code.
            If it came in the last step, the stage is finished as well.
    """
    given = StageConfig.from_config(config)
    check_config(given)
    jax.devices()  # fails early if there are none
    workdir, start = Path(workdir), time.perf_counter()
    tell = unbroken(tell) if is_main() else silent
    with contextlib.ExitStack() as stack:
        stack.enter_context(explained_disk(workdir))
        workdir.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(workdir, tell))
        if given.train.epochs:
            given = with_epochs(given, open_tokenizer(given), tell)
        if config.lora.rank and (last := finished(given, workdir, tell)) is not None:
            finish_adapter(place(given)[0], workdir, tell)  # what a kill left to do
            return result_of(given, workdir, last, start)
        preemption = Preemption(tell)
        stack.callback(preemption.close)
        scoring = evaluator(given) if evaluator is not None and given.eval.every and given.eval.benchmarks else None
        stage = prepare(given, workdir, tell, step_fn)
        steps = run_steps(stage, workdir, tell, preemption, start, scoring)
        if config.lora.rank and not config.lora.keep_state:
            finish_adapter(stage.config, workdir, tell)
    result = result_of(given, workdir, steps, start)
    tell(f"{config.stage}: done in {duration(result.seconds)}, {stage.ledger.count} samples skipped")
    if preemption.reached(steps + 1):
        tell(f"{config.stage}: asked to stop; saved after step {steps}, the last")
        raise preemption.saved()
    return result


def result_of(config: StageConfig, workdir: Path, steps: int, start: float) -> Result:
    """The result of a stage that ended after `steps`, in a process that began it at `start`."""
    used = sum(number(line, "tokens") for path in workdir.glob("metrics*.jsonl") for line in read_metrics(path))
    capacity = steps * config.data.packs_per_batch * config.data.tokens_per_pack
    return Result(workdir, steps, time.perf_counter() - start, used / capacity)


def prepare(given: StageConfig, workdir: Path, tell: Tell, step_fn: TrainStep | None = None) -> StageRun:
    """Everything that a stage's steps need, restored from its last checkpoint if there is one. Raises UserError."""
    config, chip, mesh = place(given)

    def say(lines: Iterable[str]) -> None:
        for line in lines:
            tell(f"{config.stage}: {line}")

    binding = abstract_model(config.model, config.lora)
    check_trainable(config, binding.shapes)
    target = abstract_state(config, binding, mesh)
    barrier(f"{config.stage} opens")
    kept = config.train
    checkpoints = checkpoint.Checkpoints(workdir, target, keep=kept.keep_checkpoints, period=kept.keep_period)
    saved = checkpoints.latest_folder()
    tokenizer = open_tokenizer(config)
    say(changes(given, saved, binding, tokenizer))

    ledger, rows = Ledger(of_host(workdir / "ledger.jsonl")), HostRows(mesh, config.data.packs_per_batch)
    loader = open_loader(config, tokenizer, ledger, rows.numbers, rows.sharing(config.data.frames_per_pack))
    say(loader.describe())
    held_out = open_held_out(config, binding, tokenizer, ledger, rows)
    if held_out is not None:
        say([f"the loss of {held_out.samples} held-out samples is measured every {config.eval.every} steps"])

    barrier(f"{config.stage} begins")
    if config.lora.rank:
        weights, base = load_base(config, binding, mesh, saved)
        checkpoints.keep_base(base)
        target = state = adapter_state(config, target, weights)
        say([f"adapts {base.path}, which stays where it is"])
    elif saved is None:
        state = initial_state(config, binding, mesh)
    if saved is not None:
        state, position = checkpoints.restore(target)
        loader.set_state(position)
        say([*loader.changed(), f"goes on after step {int(state.step)}"])
    if not config.lora.rank:
        checkpoints.keep_frozen(state)  # written while the step compiles
    step_fn = step_fn or build_step(config, binding, state)
    trained, frozen = count(state.params), count(state.frozen)
    say([f"{trained:,} parameters train, {frozen:,} are frozen; {mesh_text(mesh)}"])

    records = open_records(given, workdir, int(state.step))
    barrier(f"{config.stage} is prepared")  # hosts take different times to make their state
    return StageRun(
        *(config, given, chip, mesh, tokenizer, ledger, rows, loader, step_fn, state, checkpoints, records, held_out),
        make_token_losses(binding, config.train.accumulate) if config.train.loss_by_source else None,
    )


def place(given: StageConfig) -> tuple[StageConfig, Chip | None, Mesh]:
    """(the config resolved for this machine's chips, their kind, the mesh over them). Raises UserError."""
    if given.train.compile_cache:
        jax.config.update("jax_compilation_cache_dir", given.train.compile_cache)
    devices = jax.devices()
    chip = find_chip(devices[0].device_kind)
    slices = {getattr(device, "slice_index", 0) or 0 for device in devices}
    config = resolve(given, chip, len(devices), len(slices))
    if devices[0].platform == "cpu":
        keep_freed_memory()
    return config, chip, make_mesh(config.train.mesh, devices)


def changes(config: StageConfig, saved: Path | None, binding: Binding, tokenizer: Tokenizer) -> Iterator[str]:
    """Lines about differences from the checkpoint that the stage resumes or starts from. Raises UserError."""
    if saved is not None:
        yield from check_resume(saved, config, binding.shapes)
    elif config.init_from:
        saved = reading.find(config.init_from)
    if saved is not None and (line := check_tokenizer(saved, config, tokenizer)):
        yield line


def run_steps(
    stage: StageRun,
    workdir: Path,
    tell: Tell,
    preemption: Preemption,
    begin: float,
    evaluator: Evaluator | None = None,
) -> int:
    """Run the stage's steps with checkpoints, and close its resources; returns the last step. Raises Preempted."""
    config, records, state = stage.config, stage.records, stage.take_state()
    watchdog = Watchdog(timeout=config.train.lost_seconds, tell=tell, path=workdir / "hosts.json")
    observer = Observer(config, stage.chip, workdir=workdir, tell=tell, begin=begin, before=records.before)
    line = StepLine(config.stage, config.train.steps, tell, chips=stage.mesh.size // jax.process_count())
    reporter = Reporter(
        config,
        log=records.log,
        samples=records.samples,
        line=line,
        observer=observer,
        tell=tell,
        skipped_steps=int(records.before.get("skipped_steps", 0)),
        spikes=int(records.before.get("spikes", 0)),
    )
    saver = Saver(stage.checkpoints, stage.loader, stage.given, records.first)
    measuring = Measuring(
        config,
        workdir,
        stage.checkpoints,
        held_out=stage.held_out,
        evaluator=evaluator,
        reporter=reporter,
        line=line,
        tell=tell,
        first=records.first,
    )
    aside = 0.0  # seconds spent on saving and measuring since the previous step began

    def finish() -> None:
        """Wait for the step on the device, if there is one, and report it."""
        if (finished := reporter.finish()) is not None:
            watchdog.step(finished)
            preemption.done()

    with contextlib.ExitStack() as stack:
        stack.enter_context(watchdog)
        for resource in (stage.checkpoints, observer, records.log, records.samples, stage.loader):
            stack.callback(resource.close)
        stack.enter_context(explained(watchdog))
        stack.enter_context(mesh_scope(stage.mesh))
        preemption.stepping()
        if measuring.due(records.first):  # what a kill left to do
            aside = measuring.measure(state, records.first)
        for step in range(records.first + 1, config.train.steps + 1):
            if measuring.enough():
                tell(f"{config.stage}: {config.eval.patience} measurements were no better than the best: stops early")
                return step - 1
            if preemption.reached(step):
                finish()
                if reporter.finite:
                    saver.save_last(state, step - 1)
                    which = f"saved after step {step - 1}" if step > 1 else "no step was done"
                    tell(f"{config.stage}: asked to stop; {which}")
                    raise preemption.saved()
            waiting = time.perf_counter()
            host_batch, stats = next(stage.loader)
            waiting = time.perf_counter() - waiting
            if step == records.first + 1 and is_main():
                show_first_batch(host_batch, stage.tokenizer, workdir, tell)
            with jax.transfer_guard("disallow"):
                batch, by_source = stage.rows.put(host_batch), None
                if stage.token_losses is not None and step % config.train.log_every == 0:
                    losses = stage.token_losses(state.params, state.frozen, batch)
                    by_source = LossBySource(losses, host_batch, stats, stage.rows.numbers)
                state, metrics = stage.step_fn(state, batch)

            observer.step(step, stage.step_fn, waiting + aside)
            aside = 0.0
            finish()  # the previous step, so that the device never waits for the host
            reporter.begun(Pending(step, metrics, stats, waiting, by_source))
            if saver.due(step) or measuring.due(step):
                finish()
                if reporter.finite:
                    aside = saver.save(state)
                    if measuring.due(step):
                        aside += measuring.measure(state, step)
        saver.check_last(config.train.steps)
    return config.train.steps


def open_records(given: StageConfig, workdir: Path, first: int) -> Records:
    """The logs of a stage that goes on after step `first`, without what an earlier process wrote of later steps."""
    if is_main():
        reading.keep_tokenizer(given.data.tokenizer, workdir)
        write_json(workdir / "config.json", to_plain(given))
        with (workdir / "machine.jsonl").open("ab") as file:
            file.write(json_line({"after_step": first, **machine.facts()}))
    boards = open_boards(given, workdir) if is_main() else []
    log = MetricLog(workdir, boards=boards, name=of_host(Path("metrics.jsonl")).name)
    samples = SampleLog(workdir, name=of_host(Path("samples.jsonl")).name)
    return Records(log, samples, first, rewind(workdir, log, samples, first))


def rewind(workdir: Path, log: MetricLog, samples: SampleLog, step: int) -> dict[str, float]:
    """Drop all log lines after `step`, even of hosts that no longer exist; returns `Records.before`."""
    kept, last = log.rewind(step)
    samples.rewind(step)
    if is_main():
        for path in [*workdir.glob("metrics.*.jsonl"), *workdir.glob("samples.*.jsonl")]:
            if int(path.name.split(".")[1]) >= jax.process_count():
                drop_after(path, step)
    numbers = {key: number(kept, key) for key in ("skipped_steps", "spikes", "stepping")}
    return {**numbers, "elapsed": number(last, "elapsed")}


def open_tokenizer(config: StageConfig) -> Tokenizer:
    """The tokenizer of `config.data`, checked against the model's ids. Raises UserError."""
    if not config.data.tokenizer:
        raise UserError(
            "config.data.tokenizer is empty: give a tokenizer.json, tokenizer.model, SentencePiece .model or a GGUF"
        )
    tokenizer = load_tokenizer(config.data.tokenizer)
    preset, where = config.model.preset, config.data.tokenizer
    if tokenizer.vocab_size > config.model.llm.vocab_size:
        raise UserError(
            f"{where}: {tokenizer.vocab_size} tokens, but config.model.llm.vocab_size is "
            f"{config.model.llm.vocab_size}; this is {preset}: {_preset_for(tokenizer)}"
        )
    for name, wanted in config.model.special_ids.flat():
        if getattr(tokenizer, name) != wanted:
            raise UserError(
                f"{where}: <{name}> is {getattr(tokenizer, name)}, but config.model.special_ids.{name} is {wanted}; "
                f"this is {preset}: {_preset_for(tokenizer)}"
            )
    return tokenizer


def _preset_for(tokenizer: Tokenizer) -> str:
    """Advice for a tokenizer that does not fit the model."""
    models = {preset: model_config(preset) for preset in PRESETS}
    fit = [
        preset
        for preset, model in models.items()
        if tokenizer.vocab_size <= model.llm.vocab_size
        and all(getattr(tokenizer, name) == token for name, token in model.special_ids.items())
    ]
    if not fit:
        return "give the tokenizer that belongs to its weights"
    return f"say {' or '.join(f':{preset}' for preset in fit)} after the config's name, or give its own tokenizer"


def open_loader(
    config: StageConfig, tokenizer: Tokenizer, ledger: Ledger, rows: Sequence[int], sharing: Sharing | None = None
) -> Loader:
    """The loader of the stage's batches, for the `rows` that this host needs or is `sharing`. Raises UserError."""
    return make_loader(
        config.data,
        tokenizer,
        frames_per_group=frames_per_group(config.model),
        tokens_per_group=tokens_per_group(config.model, config.data.image_size),
        seed=config.seed,
        ledger=ledger,
        rows=rows,
        sharing=sharing,
    )


def open_held_out(
    config: StageConfig, binding: Binding, tokenizer: Tokenizer, ledger: Ledger, rows: HostRows
) -> HeldOutLoss | None:
    """The loss on the samples of `config.eval.held_out`, None where it is not measured. Raises UserError."""
    if not config.eval.every or not config.eval.held_out:
        return None
    batches = HeldOutBatches(
        config.eval.held_out,
        config.data,
        tokenizer,
        frames_per_group=frames_per_group(config.model),
        tokens_per_group=tokens_per_group(config.model, config.data.image_size),
        ledger=ledger,
        rows=rows.numbers,
        sharing=rows.sharing(config.data.frames_per_pack),
    )
    return HeldOutLoss(make_loss(binding, config.train.accumulate), batches, rows)


def show_first_batch(batch: PackedBatch, tokenizer: Tokenizer, workdir: Path, tell: Tell) -> None:
    """Write the first batch as a tree and as a picture into the workdir."""
    tree = batch_tree(batch)
    tell(tree)
    (workdir / "first_batch.txt").write_text(tree + "\n", encoding="utf-8")
    save_picture(batch, tokenizer, workdir / "first_batch.png")
