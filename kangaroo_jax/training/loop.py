"""A night of training, top to bottom: mesh, data, model, optimiser, checkpoint, loop."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from kangaroo_jax.chips import Chip, find_chip
from kangaroo_jax.config import PRESETS, model_config, to_plain
from kangaroo_jax.conventions import PackedBatch, UserError
from kangaroo_jax.data.batches import LoaderStats
from kangaroo_jax.data.ledger import Ledger
from kangaroo_jax.data.loader import Loader, make_loader
from kangaroo_jax.data.preview import batch_tree, save_picture
from kangaroo_jax.data.tokenizer import Tokenizer, load_tokenizer
from kangaroo_jax.host import keep_freed_memory
from kangaroo_jax.models.kangaroo import Kangaroo, frames_per_group, tokens_per_group
from kangaroo_jax.sharding import make_mesh, sharding
from kangaroo_jax.training import checkpoint
from kangaroo_jax.training.distributed import Preempted, Preemption, Watchdog, barrier, explained, is_main
from kangaroo_jax.training.host_rows import HostRows, whole_data_state
from kangaroo_jax.training.metrics import MetricLog, Progress, drop_after, duration, read_metrics
from kangaroo_jax.training.observe import Observer
from kangaroo_jax.training.optimizer import count, make_optimizer, make_schedule
from kangaroo_jax.training.parameters import Binding
from kangaroo_jax.training.placement import resolve
from kangaroo_jax.training.state import make_state, shardings_of, state_shardings
from kangaroo_jax.training.step import TrainState, TrainStep, make_train_step
from kangaroo_jax.whole_files import write_json

Tell = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a stage came to."""

    stage_dir: Path
    steps: int
    seconds: float  # of this process; a restarted stage counts from its restart
    useful_token_share: float  # tokens of samples over token places


@dataclasses.dataclass
class Stage:
    """A stage that is ready to go on after step `first`."""

    config: ConfigDict  # resolved for these chips
    plain: dict  # as given: another run of it may be on other chips
    chip: Chip | None  # None where its peak is not known
    mesh: Mesh
    tokenizer: Tokenizer
    ledger: Ledger
    rows: HostRows
    loader: Loader
    step_fn: TrainStep
    state: TrainState
    checkpoints: checkpoint.Checkpoints
    log: MetricLog
    first: int


def train(config: ConfigDict, workdir: str | Path, *, tell: Tell = print) -> Result:
    """Run one stage in `workdir`, from its last checkpoint where there is one, to `config.train.steps`.

    Args:
        config: a stage's config (`config.stage_config`).
        workdir: gets checkpoints, metrics.jsonl, ledger.jsonl, config.json, first_batch.{txt,png}.
        tell: prints a progress line.

    Raises:
        UserError: for missing files, a tokenizer or checkpoint that does not fit the model.
        Preempted: SIGTERM came; the state is saved, and the process may end with code 0.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if not is_main():
        tell = lambda line: None  # noqa: E731
    stage = prepare(config, workdir, tell)
    config = stage.config
    run_steps(stage, workdir, tell)
    seconds = time.perf_counter() - start
    tell(f"{config.stage}: done in {duration(seconds)}, {stage.ledger.count} samples skipped")
    used = sum(line["tokens"] for path in workdir.glob("metrics*.jsonl") for line in read_metrics(path))
    places = config.train.steps * config.data.packs_per_batch * config.data.tokens_per_pack
    return Result(workdir, config.train.steps, seconds, used / places)


def prepare(config: ConfigDict, workdir: Path, tell: Tell) -> Stage:
    """Everything that a stage's steps need, restored from its last checkpoint where there is one. Raises UserError."""
    # ------------------------------------------------------------------------------ mesh
    if config.train.compile_cache:
        jax.config.update("jax_compilation_cache_dir", config.train.compile_cache)
    devices = mesh_devices()
    chip = find_chip(devices[0].device_kind)
    plain = to_plain(config)
    config = resolve(config, chip, len(devices), len({getattr(d, "slice_index", 0) or 0 for d in devices}))
    mesh = make_mesh(config.train.mesh, devices)
    if devices[0].platform == "cpu":
        keep_freed_memory()
    # ------------------------------------------------------------------------------ data
    tokenizer = open_tokenizer(config)
    if is_main():
        checkpoint.keep_tokenizer(config.data.tokenizer, workdir)
        write_json(workdir / "config.json", plain)
    ledger = Ledger(of_host(workdir / "ledger.jsonl"))
    rows = HostRows(mesh, config.data.packs_per_batch)
    loader = open_loader(config, tokenizer, ledger, rows.numbers)
    for line in loader.describe():
        tell(f"{config.stage}: {line}")
    # ----------------------------------------------------------------- model and optimiser
    binding = checkpoint.abstract_model(config.model)
    state = initial_state(config, binding, mesh)
    schedule = make_schedule(config.optimizer, config.train.steps)
    optimizer = make_optimizer(config.optimizer, config.train.steps, state.params)
    step_fn = make_train_step(binding, optimizer, schedule, config.train.accumulate, shardings_of(state))
    trained, frozen = count(state.params), count(state.frozen)
    tell(f"{config.stage}: {trained:,} parameters train, {frozen:,} are frozen; {mesh_text(mesh)}")
    # ------------------------------------------------------------------------- checkpoint
    barrier(f"{config.stage} begins")
    checkpoints = checkpoint.Checkpoints(workdir, state, keep=config.train.keep_checkpoints)
    log = MetricLog(
        workdir, tensorboard=config.train.tensorboard and is_main(), name=of_host(Path("metrics.jsonl")).name
    )
    if checkpoints.latest() is not None:
        state, data_state = checkpoints.restore(state)
        loader.set_state(data_state)
        tell(f"{config.stage}: goes on after step {int(state.step)}")
    first = int(state.step)
    rewind(workdir, log, first)
    return Stage(config, plain, chip, mesh, tokenizer, ledger, rows, loader, step_fn, state, checkpoints, log, first)


def run_steps(stage: Stage, workdir: Path, tell: Tell) -> None:
    """From the stage's state to its last step, saved on the way; closes what the stage has open. Raises Preempted."""
    config, state, loader, checkpoints, log = stage.config, stage.state, stage.loader, stage.checkpoints, stage.log
    progress = Progress(config.stage, config.train.steps, tell, chips=stage.mesh.size // jax.process_count())
    observer = Observer(config, stage.chip, workdir=workdir, tell=tell)
    watchdog = Watchdog(timeout=config.train.lost_seconds, tell=tell, path=workdir / "hosts.json")
    preemption = Preemption()
    pending: tuple[int, dict[str, jax.Array], LoaderStats] | None = None
    with contextlib.ExitStack() as stack:
        stack.callback(preemption.close)
        stack.enter_context(watchdog)
        for resource in (checkpoints, observer, log, loader):
            stack.callback(resource.close)
        stack.enter_context(explained(watchdog))
        stack.enter_context(mesh_scope(stage.mesh))
        for step in range(stage.first + 1, config.train.steps + 1):
            waiting = time.perf_counter()
            host_batch, stats = next(loader)
            waiting = time.perf_counter() - waiting
            if step == stage.first + 1 and is_main():
                show_first_batch(host_batch, stage.tokenizer, workdir, tell)
            with jax.transfer_guard("disallow"):
                state, metrics = stage.step_fn(state, stage.rows.put(host_batch))

            observer.step(step, stage.step_fn)
            progress.add(
                tokens=stats.tokens,
                frames=stats.frames,
                places=stats.token_places,
                wait=waiting,
                frame_places=stats.frame_places,
                counts=stats.by_both,
            )
            if pending is not None:  # the step before: the device never waits for the host
                report(*pending, log=log, progress=progress, observer=observer, every=config.train.log_every)
                watchdog.step(pending[0])
            pending = (step, metrics, stats)
            stopping = preemption.reached(step)
            if stopping or step % config.train.checkpoint_every == 0 or step == config.train.steps:
                report(*pending, log=log, progress=progress, observer=observer, every=config.train.log_every)
                pending = None
                log.flush()
                checkpoints.save(state, whole_data_state(loader), stage.plain)
            if stopping and step < config.train.steps:
                checkpoints.wait()
                tell(f"{config.stage}: asked to stop; saved after step {step}")
                raise Preempted


def mesh_devices() -> list[jax.Device]:
    """The devices that a stage runs on: all there are, on all hosts."""
    return jax.devices()


def of_host(path: Path) -> Path:
    """`path` for the main process, `name.N.jsonl` for process N."""
    return path if is_main() else path.with_name(f"{path.stem}.{jax.process_index()}{path.suffix}")


def rewind(workdir: Path, log: MetricLog, step: int) -> None:
    """Drop what was logged after `step`, also by hosts that there were and are no more."""
    log.rewind(step)
    if is_main():
        for path in workdir.glob("metrics.*.jsonl"):
            if int(path.name.split(".")[1]) >= jax.process_count():
                drop_after(path, step)


def open_tokenizer(config: ConfigDict) -> Tokenizer:
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
    for name, wanted in config.model.special_ids.items():
        if getattr(tokenizer, name) != wanted:
            raise UserError(
                f"{where}: <{name}> is {getattr(tokenizer, name)}, but config.model.special_ids.{name} is {wanted}; "
                f"this is {preset}: {_preset_for(tokenizer)}"
            )
    return tokenizer


def _preset_for(tokenizer: Tokenizer) -> str:
    """What to do with a tokenizer that is not the model's."""
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


def open_loader(config: ConfigDict, tokenizer: Tokenizer, ledger: Ledger, rows: Sequence[int]) -> Loader:
    """The stage's batches: `rows` of them, which this host needs. Raises UserError."""
    return make_loader(
        config.data,
        tokenizer,
        frames_per_group=frames_per_group(config.model),
        tokens_per_group=tokens_per_group(config.model, config.data.image_size),
        seed=config.seed,
        ledger=ledger,
        rows=rows,
    )


def initial_state(config: ConfigDict, binding: Binding, mesh: Mesh) -> TrainState:
    """Weights of `config.init_from`, or fresh ones, split into trained and frozen; zeros in the optimiser."""

    def fresh() -> dict[str, jax.Array]:
        return binding.flatten(Kangaroo(config.model, rngs=nnx.Rngs(config.seed)))

    places = {path: sharding(mesh, axes, binding.shapes[path].shape) for path, axes in binding.axes.items()}
    if config.init_from:
        if not config.init_other_rope:
            checkpoint.check_rope(config.init_from, config.model)
        params = checkpoint.load_params(config.init_from, binding, mesh)
    else:
        params = jax.jit(fresh, out_shardings=places)()
    with mesh_scope(mesh):
        make = functools.partial(make_state, config)
        where = state_shardings(jax.eval_shape(make, params), binding, mesh)
        return jax.jit(make, out_shardings=where)(params)


@contextlib.contextmanager
def mesh_scope(mesh: Mesh) -> Iterator[None]:
    """Activations are constrained over `mesh` inside; on one device there is nothing to constrain."""
    if mesh.size == 1:
        yield
    else:
        with jax.set_mesh(mesh):
            yield


def mesh_text(mesh: Mesh) -> str:
    """`1 cpu device` or the mesh's sizes."""
    kind = mesh.devices.flat[0].platform
    if mesh.size == 1:
        return f"1 {kind} device"
    return f"{mesh.size} {kind} devices, " + ", ".join(f"{name} {size}" for name, size in mesh.shape.items())


def report(
    step: int,
    metrics: dict[str, jax.Array],
    stats: LoaderStats,
    *,
    log: MetricLog,
    progress: Progress,
    observer: Observer,
    every: int,
) -> None:
    """Write a finished step's metrics; print every `every` steps."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    counts = stats.to_json()
    if step % every:
        log.write(step, {**values, **counts})
        return
    steps, seconds = progress.window()
    use = {**progress.rates(), **observer.values(steps, seconds)} if steps else {}
    log.write(step, {**values, **counts, **use})
    progress.line(step, values, stats.skipped, use)


def show_first_batch(batch: PackedBatch, tokenizer: Tokenizer, workdir: Path, tell: Tell) -> None:
    """The first batch as a tree and as a picture, in the workdir."""
    tree = batch_tree(batch)
    tell(tree)
    (workdir / "first_batch.txt").write_text(tree + "\n", encoding="utf-8")
    save_picture(batch, tokenizer, workdir / "first_batch.png")
