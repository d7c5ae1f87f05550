"""The base of an adapter: frozen weights of another checkpoint, which training reads and never writes again."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.checkpoints.adapters import Base, find_base, kept_base
from kangaroo_jax.checkpoints.digests import Digests, RunningDigest, differs, digests
from kangaroo_jax.checkpoints.frozen import weight_folders
from kangaroo_jax.checkpoints.stored import Stored, stored_form
from kangaroo_jax.config import StageConfig
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.llama import contracted_of
from kangaroo_jax.models.lora import initial_factors, is_factor
from kangaroo_jax.models.parameters import Binding, Params, abstract_model
from kangaroo_jax.models.quantized import EMBEDDING, EMBEDDING_SCALE, KERNEL, SCALE, quantize, quantize_rows
from kangaroo_jax.sharding import mesh_scope, sharding
from kangaroo_jax.training.optimizer import make_optimizer
from kangaroo_jax.training.step import TrainState


def load_base(config: StageConfig, binding: Binding, mesh: Mesh, saved: Path | None) -> tuple[Params, Base]:
    """(the frozen weights that `config` adapts, sharded over `mesh`; what they are of).

    `saved`: the checkpoint that the stage goes on from; the base must be the one that it names. Weights have the type
    `optimizer.frozen_dtype`, those that `lora.quantize` rounds their format.

    Raises:
        UserError: the base is gone, another (the first tensor is named), damaged, of another model, itself an adapter,
            or stored in another format than `lora.quantize`.
    """
    kept = kept_base(saved) if saved is not None else None
    if saved is not None and kept is not None:
        folder = find_base(saved, kept, config.init_from)
    else:
        folder = reading.refuse_adapter(reading.find(config.init_from))
    if not config.init_other_rope:
        reading.check_rope(folder, config.model)
    with reading.named_if_damaged(folder):
        stored = Stored(*weight_folders(folder))
    form, wanted = stored_form(stored) or "", config.lora.quantize
    if form and form != wanted:
        raise UserError(f"{folder}: its weights are stored as {form}; set --config.lora.quantize={form}")
    if wanted:
        params, sums = _read_quantized(config, folder, stored, binding, mesh)
    else:
        loaded = reading.load_params(folder, abstract_model(config.model), mesh)
        sums = digests(loaded)[0]
        params = {path: x.astype(config.optimizer.frozen_dtype) for path, x in loaded.items()}
    if kept is not None and saved is not None:
        kept.check(sums, folder, saved)
    return params, Base(folder, sums)


def adapter_state(config: StageConfig, target: TrainState, frozen: Params) -> TrainState:
    """Step 0 of an adapter in the shapes and shardings of `target`: fresh factors, and zeros in the optimiser."""
    optimizer = make_optimizer(config.optimizer, config.train.steps, target.params)
    make = functools.partial(initial_factors, target.params, config.seed)
    where = jax.tree.map(lambda x: x.sharding, (target.step, target.params, target.opt_state))
    mesh = where[0].mesh

    def begin() -> tuple[jax.Array, Params, object]:
        trained = make()
        return jnp.zeros((), jnp.int32), trained, optimizer.init(trained)

    with mesh_scope(mesh):
        step, trained, opt_state = jax.jit(begin, out_shardings=where)()
    return TrainState(step, trained, frozen, opt_state)


def _read_quantized(
    config: StageConfig, folder: Path, stored: Stored, binding: Binding, mesh: Mesh
) -> tuple[Params, Digests]:
    """The base's weights, a parameter at a time in the host's memory, and the sums of what is stored."""
    form, contracted = config.lora.quantize, contracted_of(config.model.llm)
    shapes = {path: x for path, x in binding.shapes.items() if not is_factor(path)}
    already = stored_form(stored) is not None
    wanted = shapes if already else dict(abstract_model(config.model).shapes)
    own = {path for path in wanted if path.endswith(f"/{EMBEDDING_SCALE}")}  # never stored
    reading.check_shapes(stored.specs, {path: x for path, x in wanted.items() if path not in own}, folder)
    saved = {name: value for tree in reading.saved_digests(folder).values() for name, value in tree.items()}
    params: Params = {}
    sums: Digests = {}

    def put(path: str, array: np.ndarray) -> None:
        where = sharding(mesh, binding.axes[path], array.shape)
        params[path] = jax.make_array_from_callback(array.shape, where, lambda index: array[index])

    for path in sorted(stored.specs):
        running, parts = RunningDigest(), []
        for part in stored.layers(path):
            running.add(part)
            parts.append(part)
        sums[path] = running.value
        if path in saved and differs(running.value, saved[path]):
            raise reading.damaged(folder, f"params: {path} is not as it was saved")
        stored.forget(path)
        if path in contracted and not already:
            stacked = path.startswith("llm/layers/")
            rounded = [quantize(part[0] if stacked else part, contracted[path], form) for part in parts]
            for name, arrays in zip((KERNEL, SCALE), zip(*rounded, strict=True), strict=True):
                put(path.removesuffix(KERNEL) + name, np.stack(arrays) if stacked else arrays[0])
        elif path in contracted or path.endswith(f"/{SCALE}"):
            put(path, np.concatenate(parts))
        elif path == f"llm/{EMBEDDING}":
            for name, array in zip((EMBEDDING, EMBEDDING_SCALE), quantize_rows(parts[0]), strict=True):
                put(f"llm/{name}", array)
        else:
            put(path, np.concatenate(parts).astype(jnp.dtype(config.optimizer.frozen_dtype)))
    return {path: params[path] for path in shapes}, sums
