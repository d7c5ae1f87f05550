"""A night of training, top to bottom: mesh, data, model, optimiser, checkpoint, loop."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from kangaroo_jax.config import to_plain
from kangaroo_jax.conventions import PackedBatch, UserError
from kangaroo_jax.data.ledger import Ledger
from kangaroo_jax.data.loader import Loader, LoaderStats, make_loader, merge_states
from kangaroo_jax.data.preview import batch_tree, save_picture
from kangaroo_jax.data.tokenizer import Tokenizer, load_tokenizer
from kangaroo_jax.host import keep_freed_memory
from kangaroo_jax.models.kangaroo import Kangaroo, frames_per_group, tokens_per_group
from kangaroo_jax.sharding import make_mesh, sharding
from kangaroo_jax.training import checkpoint
from kangaroo_jax.training.metrics import MetricLog, Progress, duration, read_metrics
from kangaroo_jax.training.optimizer import count, make_optimizer, make_schedule
from kangaroo_jax.training.parameters import Binding, split_trainable
from kangaroo_jax.training.step import TrainState, make_train_step

Tell = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a stage came to."""

    stage_dir: Path
    steps: int
    seconds: float  # of this process; a restarted stage counts from its restart
    useful_token_share: float  # tokens of samples over token places


def train(config: ConfigDict, workdir: str | Path, *, tell: Tell = print) -> Result:
    """Run one stage in `workdir`, from its last checkpoint where there is one, to `config.train.steps`.

    Args:
        config: a stage's config (`config.stage_config`).
        workdir: gets checkpoints, metrics.jsonl, ledger.jsonl, config.json, first_batch.{txt,png}.
        tell: prints a progress line.

    Raises:
        UserError: for missing files, a tokenizer or checkpoint that does not fit the model.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    # ------------------------------------------------------------------------------ mesh
    mesh = make_mesh(config.train.mesh)
    if mesh.devices.flat[0].platform == "cpu":
        keep_freed_memory()

    # ------------------------------------------------------------------------------ data
    tokenizer = open_tokenizer(config)
    checkpoint.keep_tokenizer(config.data.tokenizer, workdir)
    ledger = Ledger(workdir / "ledger.jsonl")
    loader = open_loader(config, tokenizer, ledger)
    for line in loader.describe():
        tell(f"{config.stage}: {line}")

    # ----------------------------------------------------------------- model and optimiser
    binding = checkpoint.abstract_model(config.model)
    state = initial_state(config, binding, mesh)
    schedule = make_schedule(config.optimizer, config.train.steps)
    optimizer = make_optimizer(config.optimizer, config.train.steps, state.params)
    step_fn = make_train_step(binding, optimizer, schedule)
    trained, frozen = count(state.params), count(state.frozen)
    tell(f"{config.stage}: {trained:,} parameters train, {frozen:,} are frozen; {mesh_text(mesh)}")

    # ------------------------------------------------------------------------- checkpoint
    checkpoints = checkpoint.Checkpoints(workdir, keep=config.train.keep_checkpoints)
    log = MetricLog(workdir, tensorboard=config.train.tensorboard)
    write_json(workdir / "config.json", to_plain(config))
    if checkpoints.latest() is not None:
        state, data_state = checkpoints.restore(state)
        loader.set_state(data_state)
        tell(f"{config.stage}: goes on after step {int(state.step)}")
    first = int(state.step)
    log.rewind(first)

    # ------------------------------------------------------------------------------- loop
    progress = Progress(config.stage, config.train.steps, tell)
    pending: tuple[int, dict[str, jax.Array], LoaderStats] | None = None
    with mesh_scope(mesh), contextlib.closing(loader), contextlib.closing(log):
        for step in range(first + 1, config.train.steps + 1):
            waiting = time.perf_counter()
            host_batch, stats = next(loader)
            waiting = time.perf_counter() - waiting
            if step == first + 1:
                show_first_batch(host_batch, tokenizer, workdir, tell)
            with jax.transfer_guard("disallow"):
                state, metrics = step_fn(state, put_batch(host_batch, mesh))

            progress.add(
                tokens=stats.tokens,
                frames=stats.frames,
                places=stats.token_places,
                wait=waiting,
                frame_places=stats.frame_places,
                counts=stats.by_both,
            )
            if pending is not None:  # the step before: the device never waits for the host
                report(*pending, log=log, progress=progress, every=config.train.log_every)
            pending = (step, metrics, stats)
            if step % config.train.checkpoint_every == 0 or step == config.train.steps:
                report(*pending, log=log, progress=progress, every=config.train.log_every)
                pending = None
                log.flush()
                checkpoints.save(state, whole_data_state(loader), to_plain(config))
    checkpoints.close()
    seconds = time.perf_counter() - start
    tell(f"{config.stage}: done in {duration(seconds)}, {ledger.count} samples skipped")
    used = sum(line["tokens"] for line in read_metrics(log.path))
    places = config.train.steps * config.data.packs_per_batch * config.data.tokens_per_pack
    return Result(workdir, config.train.steps, seconds, used / places)


def open_tokenizer(config: ConfigDict) -> Tokenizer:
    """The tokenizer of `config.data`, checked against the model's ids. Raises UserError."""
    if not config.data.tokenizer:
        raise UserError(
            "config.data.tokenizer is empty: give a tokenizer.json, tokenizer.model or SentencePiece .model"
        )
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.llm.vocab_size:
        raise UserError(
            f"{config.data.tokenizer}: {tokenizer.vocab_size} tokens, but config.model.llm.vocab_size is "
            f"{config.model.llm.vocab_size}; use the model's own tokenizer"
        )
    for name, wanted in config.model.special_ids.items():
        if getattr(tokenizer, name) != wanted:
            raise UserError(
                f"{config.data.tokenizer}: <{name}> is {getattr(tokenizer, name)}, but config.model.special_ids.{name} "
                f"is {wanted}; set it to the tokenizer's"
            )
    return tokenizer


def open_loader(config: ConfigDict, tokenizer: Tokenizer, ledger: Ledger) -> Loader:
    """The stage's batches, this host's share of them."""
    return make_loader(
        config.data,
        tokenizer,
        frames_per_group=frames_per_group(config.model),
        tokens_per_group=tokens_per_group(config.model, config.data.image_size),
        seed=config.seed,
        ledger=ledger,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def whole_data_state(loader: Loader) -> bytes:
    """The loader's state with the rows of all hosts, which must call this after the same batch."""
    mine = loader.get_state()
    if jax.process_count() == 1:
        return mine
    sizes = multihost_utils.process_allgather(np.array(len(mine)))
    padded = np.frombuffer(mine.ljust(int(sizes.max())), np.uint8)
    return merge_states([bytes(state) for state in multihost_utils.process_allgather(padded)])


def initial_state(config: ConfigDict, binding: Binding, mesh: Mesh) -> TrainState:
    """Weights of `config.init_from`, or fresh ones, split into trained and frozen; zeros in the optimiser."""

    def fresh() -> dict[str, jax.Array]:
        return binding.flatten(Kangaroo(config.model, rngs=nnx.Rngs(config.seed)))

    places = {path: sharding(mesh, axes) for path, axes in binding.axes.items()}
    if config.init_from:
        params = checkpoint.load_params(config.init_from, binding, mesh)
    else:
        params = jax.jit(fresh, out_shardings=places)()

    def split(params: dict[str, jax.Array]) -> TrainState:
        trained, frozen = split_trainable(params, config.optimizer.trainable, config.optimizer.frozen_dtype)
        optimizer = make_optimizer(config.optimizer, config.train.steps, trained)
        return TrainState(jnp.zeros((), jnp.int32), trained, frozen, optimizer.init(trained))

    with mesh_scope(mesh):
        return jax.jit(split)(params)


def put_batch(batch: PackedBatch, mesh: Mesh) -> PackedBatch:
    """This host's rows as global arrays, packs over the mesh's batch axes."""

    def put(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding(mesh, ("batch",) + (None,) * (x.ndim - 1)), x)

    return jax.tree.map(put, batch)


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
    step: int, metrics: dict[str, jax.Array], stats: LoaderStats, *, log: MetricLog, progress: Progress, every: int
) -> None:
    """Write a finished step's metrics; print every `every` steps."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    log.write(step, {**values, **stats.to_json()})
    if step % every == 0:
        progress.line(step, values, stats.skipped)


def show_first_batch(batch: PackedBatch, tokenizer: Tokenizer, workdir: Path, tell: Tell) -> None:
    """The first batch as a tree and as a picture, in the workdir."""
    tree = batch_tree(batch)
    tell(tree)
    (workdir / "first_batch.txt").write_text(tree + "\n", encoding="utf-8")
    save_picture(batch, tokenizer, workdir / "first_batch.png")


def write_json(path: Path, value: object) -> None:
    """Write JSON whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)
