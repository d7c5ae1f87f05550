"""The training loop, top to bottom: mesh, model, data, state, records, steps."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.chips import Chip, find_chip
from kangaroo_jax.config import PRESETS, StageConfig, frames_per_group, model_config, to_plain, tokens_per_group
from kangaroo_jax.conventions import PackedBatch
from kangaroo_jax.data.batches.ledger import Ledger
from kangaroo_jax.data.batches.loader import Loader, make_loader
from kangaroo_jax.data.batches.preview import batch_tree, save_picture
from kangaroo_jax.data.tokenizer import Tokenizer, load_tokenizer
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.parameters import Binding, abstract_model
from kangaroo_jax.sharding import make_mesh, mesh_scope, mesh_text
from kangaroo_jax.system.files import write_json
from kangaroo_jax.system.memory import keep_freed_memory
from kangaroo_jax.system.progress import Tell, duration
from kangaroo_jax.training import checkpoint
from kangaroo_jax.training.check import check_config, check_trainable
from kangaroo_jax.training.distributed import Watchdog, barrier, explained, is_main
from kangaroo_jax.training.host_rows import HostRows, whole_data_state
from kangaroo_jax.training.initial import initial_state
from kangaroo_jax.training.metrics import MetricLog, SampleLog, StepLine, drop_after, number, read_metrics
from kangaroo_jax.training.observe import Observer
from kangaroo_jax.training.optimizer import count
from kangaroo_jax.training.placement import resolve
from kangaroo_jax.training.reporting import Pending, Reporter, of_host
from kangaroo_jax.training.resume import check_resume, check_tokenizer
from kangaroo_jax.training.state import abstract_state, build_step
from kangaroo_jax.training.step import TrainState, TrainStep
from kangaroo_jax.training.stopping import Preemption, SaveClock, explained_disk, locked, unbroken


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a stage."""

    stage_dir: Path
    steps: int
    seconds: float  # time of this process; a restarted stage counts from its restart
    useful_token_share: float  # tokens of samples over all token positions


@dataclasses.dataclass
class StageRun:
    """A stage that is ready to go on after step `first`."""

    config: StageConfig  # resolved for these chips
    given: StageConfig  # which a run on other chips may resolve otherwise
    chip: Chip | None  # None if its peak is unknown
    mesh: Mesh
    tokenizer: Tokenizer
    ledger: Ledger
    rows: HostRows
    loader: Loader
    step_fn: TrainStep
    state: TrainState
    checkpoints: checkpoint.Checkpoints
    log: MetricLog
    samples: SampleLog
    first: int
    before: dict[str, float]  # from the steps until `first`: skipped_steps, and the times of `observe.Observer`


def train(config: ConfigDict, workdir: str | Path, *, tell: Tell = print) -> Result:
    """Run one stage in `workdir`, from its last checkpoint if there is one, to `config.train.steps`.

    Args:
        config: a stage's config (`config.stage_config`).
        workdir: receives checkpoints, metrics.jsonl, samples.jsonl, ledger.jsonl, config.json, first_batch.{txt,png}.
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
    tell = unbroken(tell) if is_main() else lambda line: None
    with contextlib.ExitStack() as stack:
        stack.enter_context(explained_disk(workdir))
        workdir.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(workdir, tell))
        preemption = Preemption(tell)
        stack.callback(preemption.close)
        stage = prepare(given, workdir, tell)
        run_steps(stage, workdir, tell, preemption, start)
    seconds = time.perf_counter() - start
    tell(f"{config.stage}: done in {duration(seconds)}, {stage.ledger.count} samples skipped")
    used = sum(number(line, "tokens") for path in workdir.glob("metrics*.jsonl") for line in read_metrics(path))
    capacity = config.train.steps * config.data.packs_per_batch * config.data.tokens_per_pack
    if preemption.reached(config.train.steps + 1):
        tell(f"{config.stage}: asked to stop; saved after step {config.train.steps}, the last")
        raise preemption.saved()
    return Result(workdir, config.train.steps, seconds, used / capacity)


def prepare(given: StageConfig, workdir: Path, tell: Tell) -> StageRun:
    """Everything that a stage's steps need, restored from its last checkpoint if there is one. Raises UserError."""
    # ------------------------------------------------------------------------------ mesh
    if given.train.compile_cache:
        jax.config.update("jax_compilation_cache_dir", given.train.compile_cache)
    devices = jax.devices()
    chip = find_chip(devices[0].device_kind)
    config = resolve(given, chip, len(devices), len({getattr(d, "slice_index", 0) or 0 for d in devices}))
    mesh = make_mesh(config.train.mesh, devices)
    if devices[0].platform == "cpu":
        keep_freed_memory()
    # ----------------------------------------------------------------- model and tokenizer
    binding = abstract_model(config.model)
    check_trainable(config, binding.shapes)
    state: TrainState = abstract_state(config, binding, mesh)
    barrier(f"{config.stage} opens")
    checkpoints = checkpoint.Checkpoints(
        workdir, state, keep=config.train.keep_checkpoints, period=config.train.keep_period
    )
    saved = checkpoints.latest_folder()
    tokenizer = open_tokenizer(config)
    for line in changes(given, saved, binding, tokenizer):
        tell(f"{config.stage}: {line}")
    # ------------------------------------------------------------------------------ data
    ledger = Ledger(of_host(workdir / "ledger.jsonl"))
    rows = HostRows(mesh, config.data.packs_per_batch)
    loader = open_loader(config, tokenizer, ledger, rows.numbers)
    for line in loader.describe():
        tell(f"{config.stage}: {line}")
    # ------------------------------------------------------------------------------ state
    barrier(f"{config.stage} begins")
    if saved is not None:
        state, data_state = checkpoints.restore(state)
        loader.set_state(data_state)
        for line in loader.changed():
            tell(f"{config.stage}: {line}")
        tell(f"{config.stage}: goes on after step {int(state.step)}")
    else:
        state = initial_state(config, binding, mesh)
    checkpoints.keep_frozen(state)  # written while the step compiles
    step_fn = build_step(config, binding, state)
    trained, frozen = count(state.params), count(state.frozen)
    tell(f"{config.stage}: {trained:,} parameters train, {frozen:,} are frozen; {mesh_text(mesh)}")
    # ------------------------------------------------------------------------------ records
    if is_main():
        reading.keep_tokenizer(config.data.tokenizer, workdir)
        write_json(workdir / "config.json", to_plain(given))
    log = MetricLog(
        workdir, tensorboard=config.train.tensorboard and is_main(), name=of_host(Path("metrics.jsonl")).name
    )
    samples = SampleLog(workdir, name=of_host(Path("samples.jsonl")).name)
    first = int(state.step)
    before = rewind(workdir, log, samples, first)
    barrier(f"{config.stage} is prepared")  # hosts take different times to make their state
    return StageRun(
        config,
        given,
        chip,
        mesh,
        tokenizer,
        ledger,
        rows,
        loader,
        step_fn,
        state,
        checkpoints,
        log,
        samples,
        first,
        before,
    )


def changes(config: StageConfig, saved: Path | None, binding: Binding, tokenizer: Tokenizer) -> Iterator[str]:
    """Lines about differences from the checkpoint that the stage resumes or starts from. Raises UserError."""
    if saved is not None:
        yield from check_resume(saved, config, binding.shapes)
    elif config.init_from:
        saved = reading.find(config.init_from)
    if saved is not None and (line := check_tokenizer(saved, config, tokenizer)):
        yield line


def run_steps(stage: StageRun, workdir: Path, tell: Tell, preemption: Preemption, begin: float) -> None:
    """Run the stage's steps to the last, with checkpoints; closes the stage's resources. Raises Preempted."""
    config, state, loader, checkpoints = stage.config, stage.state, stage.loader, stage.checkpoints
    stage.state = None  # type: ignore[assignment]  # the first step takes its memory
    line = StepLine(config.stage, config.train.steps, tell, chips=stage.mesh.size // jax.process_count())
    observer = Observer(config, stage.chip, workdir=workdir, tell=tell, begin=begin, before=stage.before)
    reporter = Reporter(
        config,
        log=stage.log,
        samples=stage.samples,
        line=line,
        observer=observer,
        tell=tell,
        skipped_steps=int(stage.before.get("skipped_steps", 0)),
    )
    watchdog = Watchdog(timeout=config.train.lost_seconds, tell=tell, path=workdir / "hosts.json")
    clock = SaveClock(config.train.checkpoint_minutes)
    pending: Pending | None = None
    aside = 0.0  # seconds spent on saving since the previous step began
    owed = False  # whether a checkpoint is due and waits for a step with a finite loss

    def finish() -> None:
        """Wait for the step on the device and report it."""
        nonlocal pending
        if pending is not None:
            reporter.report(pending)
            watchdog.step(pending.step)
            preemption.done()
            pending = None

    def save() -> None:
        checkpoints.save(state, whole_data_state(loader), to_plain(stage.given))
        clock.saved()

    with contextlib.ExitStack() as stack:
        stack.enter_context(watchdog)
        for resource in (checkpoints, observer, stage.log, stage.samples, loader):
            stack.callback(resource.close)
        stack.enter_context(explained(watchdog))
        stack.enter_context(mesh_scope(stage.mesh))
        preemption.stepping()
        for step in range(stage.first + 1, config.train.steps + 1):
            asked = preemption.reached(step)
            if asked:
                finish()
            if asked and reporter.finite:
                if step - 1 > stage.first and checkpoints.begun != step - 1:
                    save()
                checkpoints.wait()
                which = f"saved after step {step - 1}" if step > 1 else "no step was done"
                tell(f"{config.stage}: asked to stop; {which}")
                raise preemption.saved()
            waiting = time.perf_counter()
            host_batch, stats = next(loader)
            waiting = time.perf_counter() - waiting
            if step == stage.first + 1 and is_main():
                show_first_batch(host_batch, stage.tokenizer, workdir, tell)
            with jax.transfer_guard("disallow"):
                state, metrics = stage.step_fn(state, stage.rows.put(host_batch))

            observer.step(step, stage.step_fn, waiting + aside)
            aside = 0.0
            finish()  # report the previous step, so that the device never waits for the host
            pending = Pending(step, metrics, stats, waiting)
            owed = clock.due(step) or saved_by_number(step, config) or owed
            if owed:
                finish()
            if owed and reporter.finite:
                saving = time.perf_counter()
                save()
                aside, owed = time.perf_counter() - saving, False
        if owed:
            raise reading.NotFinite(
                f"{config.stage}: step {config.train.steps}, the last, was skipped: nothing shows that the weights are "
                "sound, and they are not saved; run again with --config.train.steps="
                f"{config.train.steps + 1} to go on from the last checkpoint and end with other samples"
            )


def saved_by_number(step: int, config: StageConfig) -> bool:
    """Whether a checkpoint follows `step` by its number, independently of time."""
    every = [number for number in (config.train.checkpoint_every, config.train.keep_period) if number]
    return step == config.train.steps or any(step % number == 0 for number in every)


def rewind(workdir: Path, log: MetricLog, samples: SampleLog, step: int) -> dict[str, float]:
    """Drop all log lines after `step`, even of hosts that no longer exist; returns `Stage.before`."""
    kept, last = log.rewind(step)
    samples.rewind(step)
    if is_main():
        for path in [*workdir.glob("metrics.*.jsonl"), *workdir.glob("samples.*.jsonl")]:
            if int(path.name.split(".")[1]) >= jax.process_count():
                drop_after(path, step)
    numbers = {key: number(kept, key) for key in ("skipped_steps", "stepping")}
    return {**numbers, "elapsed": number(last, "elapsed")}


def open_tokenizer(config: StageConfig) -> Tokenizer:
    """The tokenizer of `config.data`, checked against the model's ids. Raises UserError."""
    if not config.data.tokenizer:
        raise UserError(
            "config.data.tokenizer is empty: give a tokenizer.json, tokenizer.model or SentencePiece .model"
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


def open_loader(config: StageConfig, tokenizer: Tokenizer, ledger: Ledger, rows: Sequence[int]) -> Loader:
    """The loader of the stage's batches, for the `rows` that this host needs. Raises UserError."""
    return make_loader(
        config.data,
        tokenizer,
        frames_per_group=frames_per_group(config.model),
        tokens_per_group=tokens_per_group(config.model, config.data.image_size),
        seed=config.seed,
        ledger=ledger,
        rows=rows,
    )


def show_first_batch(batch: PackedBatch, tokenizer: Tokenizer, workdir: Path, tell: Tell) -> None:
    """Write the first batch as a tree and as a picture into the workdir."""
    tree = batch_tree(batch)
    tell(tree)
    (workdir / "first_batch.txt").write_text(tree + "\n", encoding="utf-8")
    save_picture(batch, tokenizer, workdir / "first_batch.png")
