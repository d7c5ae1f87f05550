"""Weights for inference, read a tensor at a time: checked, cast, quantised and placed; none are in memory twice.

The decoder's layers stand apart (`models.stack.unstack_layers`), the ViT's stay stacked.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.checkpoints.digests import Digests, RunningDigest, differs
from kangaroo_jax.checkpoints.frozen import EMA, FOLDER, weight_folders
from kangaroo_jax.checkpoints.stored import Stored, check_finite, stored_form, whole
from kangaroo_jax.config import ModelConfig, StageConfig
from kangaroo_jax.data.tokenizer import Tokenizer, load_tokenizer
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.kangaroo import KangarooModel
from kangaroo_jax.models.parameters import Binding
from kangaroo_jax.models.quantized import FORMATS, KERNEL, SCALE, as_quantized, dequantize, linear_maps, quantize
from kangaroo_jax.sharding import sharding

DTYPES = ("float32", "bfloat16", "float16")
_LAYERS = "llm/layers/"
_PIECE = 256 << 20  # bytes of a matrix that are read at a time


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model to talk to."""

    model: KangarooModel  # its decoder's layers stand apart
    config: StageConfig  # of the stage that trained it
    tokenizer: Tokenizer
    weights_id: str  # names the numbers, the dtype in which they compute and how they are quantised
    dtype: str
    quantized: str | None  # as which format the decoder's weights are rounded
    folder: Path  # of the checkpoint
    sums: Digests  # of its arrays, as they are stored


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    mesh: Mesh | None = None,
    ema: bool = False,
) -> Loaded:
    """Load what training or a conversion wrote: a curriculum's folder (its last stage), a stage's, or one checkpoint.

    Args:
        path: the folder.
        dtype: of the computation, and of weights that are not quantised; by default what suits the device.
        quantize: `int8` or `int4`, of the decoder's linear maps; a checkpoint that was stored so needs no word. A CPU,
            which is slow at it, gets the rounded numbers in `dtype`.
        mesh: what to shard them over.
        ema: take the average of the weights that a run kept (`config.optimizer.ema`).

    Raises:
        UserError: there is no checkpoint or tokenizer, it is damaged or of another model than its config (the first
            wrong tensor is named), or `dtype` or `quantize` is none of those known.
    """
    folder = reading.refuse_adapter(reading.find(path))
    dtype = dtype or compute_dtype()
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    if quantize is not None and quantize not in FORMATS:
        raise UserError(f"quantize {quantize!r}: use one of {', '.join(FORMATS)}")
    config = reading.load_stage(folder)
    tokenizer = load_tokenizer(reading.find_tokenizer(folder))
    reader = _Reader(folder, config.model, dtype, quantize, mesh, ema)
    model = reader.model()
    told = [reader.sums, dtype, reader.form, dataclasses.asdict(config.model)]
    name = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return Loaded(model, config, tokenizer, name, dtype, reader.form, folder, reader.sums)


def compute_dtype() -> str:
    """float32 on a CPU, bfloat16 on a TPU and on GPUs that multiply it (Ampere and later), float16 on older ones."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return "float32"
    if device.platform in ("gpu", "cuda") and float(getattr(device, "compute_capability", 8)) < 8:
        return "float16"
    return "bfloat16"


def _multiplies_whole_numbers() -> bool:
    """Whether the device is as fast with quantised weights as with others: a CPU takes six times as long."""
    return bool(jax.devices()[0].platform != "cpu")


class _Reader:
    """Reads one checkpoint."""

    def __init__(
        self, folder: Path, config: ModelConfig, dtype: str, form: str | None, mesh: Mesh | None, ema: bool
    ) -> None:
        self._folder, self._mesh, self._dtype = folder, mesh, jnp.dtype(dtype)
        folders = weight_folders(folder, ema)
        with reading.named_if_damaged(folder):
            self._stored = Stored(*folders)
            saved = reading.saved_digests(folder)
        self._saved: Mapping[str, Any] = {**saved.get(FOLDER, {}), **saved.get(EMA if ema else "params", {})}
        stored = stored_form(self._stored)
        if form is not None and stored not in (None, form):
            raise UserError(f"{folder}: its weights are stored as {stored}, which cannot become {form}; convert anew")
        self.form = stored or form
        self.sums: Digests = {}
        self._stored_form = stored
        self._kept_form = self.form if _multiplies_whole_numbers() else None
        config = dataclasses.replace(config, dtype=dtype)
        self._plain, there, self._target = (
            _abstract(config, None),
            _abstract(config, stored),
            _abstract(config, self._kept_form),
        )
        self._contracted = {f"llm/{path}/{KERNEL}": m.contracted for path, m in linear_maps(self._plain.llm)}
        self._check(Binding(there))
        self._names = dict.fromkeys(Binding(self._plain).shapes)
        self._binding = Binding(self._target.unstack())

    def _check(self, wanted: Binding) -> None:
        """Raise UserError that names the first tensor that is not as the config, or its format, wants it."""
        reading.check_shapes(self._stored.specs, wanted.shapes, self._folder)
        for name in sorted(wanted.shapes):
            found, right = self._stored.specs[name].dtype, wanted.shapes[name].dtype
            if (found.kind in "iu" or jnp.issubdtype(right, jnp.integer)) and found != right:
                raise UserError(f"{self._folder}: tensor {name} is {found.name}, where {right.name} belongs")

    def model(self) -> KangarooModel:
        """The model with its weights."""
        params: dict[str, jax.Array] = {}
        for name in self._names:
            with reading.named_if_damaged(self._folder):
                for target, array in self._tensors(name):
                    params[target] = self._placed(target, array)
        model: KangarooModel = self._binding.bind(params)
        return model

    def _tensors(self, name: str) -> Iterator[tuple[str, np.ndarray]]:
        """A parameter as the model has it: of each layer, with its scale where it is kept quantised."""
        spec, layered = self._stored.specs[name], name.startswith(_LAYERS)
        if not layered and len(spec.shape) == 2 and self._stored_form is None:
            yield from self._in_pieces(name)
            return
        parts: list[int | None] = list(range(spec.shape[0])) if layered else [None]
        digests = {name: RunningDigest()}
        scaled = self._stored_form is not None and name in self._contracted
        if scaled:
            digests[_scale_of(name)] = RunningDigest()
        for layer in parts:
            arrays = {}
            for stored, digest in digests.items():
                arrays[stored] = self._read(stored, layer)
                digest.add(arrays[stored])
            target = name if layer is None else f"{_LAYERS}{layer}/{name.removeprefix(_LAYERS)}"
            yield from self._converted(name, target, arrays[name], arrays.get(_scale_of(name)))
        for stored, digest in digests.items():
            self._compare(stored, digest.value)
            self._stored.forget(stored)

    def _in_pieces(self, name: str) -> Iterator[tuple[str, np.ndarray]]:
        """A matrix without layers, an embedding or a head, with one piece of what is stored in memory.

        A piece of what is to be rounded is some of the outputs.
        """
        shape, digest, made = self._stored.specs[name].shape, RunningDigest(), dict[str, np.ndarray]()
        axis = -1 if name in self._contracted else 0
        for piece in self._stored.pieces(name, axis, _PIECE):
            array = self._stored.read(name, (slice(0, shape[0]), piece) if axis else (piece, slice(0, shape[1])))
            if axis:
                digest.add_columns(array, piece.start, shape[1])
            else:
                digest.add(array)
            for target, part in self._converted(name, name, array, None):
                if target not in made:
                    whole_shape = list(part.shape)
                    whole_shape[axis] = shape[axis]
                    made[target] = _aligned(tuple(whole_shape), part.dtype)
                made[target][(..., piece) if axis else piece] = part
        self._compare(name, digest.value)
        self._stored.forget(name)
        yield from made.items()

    def _read(self, name: str, layer: int | None) -> np.ndarray:
        shape = self._stored.specs[name].shape
        if layer is None:
            return self._stored.read(name, whole(shape))
        array: np.ndarray = self._stored.read(name, (slice(layer, layer + 1), *whole(shape[1:])))[0]
        return array

    def _converted(
        self, name: str, target: str, array: np.ndarray, scale: np.ndarray | None
    ) -> Iterator[tuple[str, np.ndarray]]:
        contracted = self._contracted.get(name)
        if contracted is None or self.form is None:
            yield target, self._cast(target, array)
            return
        if scale is None:
            array, scale = quantize(array, contracted, self.form)
        if self._kept_form is None:
            yield target, self._cast(target, dequantize(array, scale, contracted))
        else:
            yield target, array
            yield _scale_of(target), scale

    def _cast(self, target: str, array: np.ndarray) -> np.ndarray:
        """In the dtype of the computation; the scales and biases of norms keep theirs."""
        if _keeps_its_dtype(self._binding.axes[target]) or array.dtype == self._dtype:
            return array
        with np.errstate(over="ignore"):
            cast = array.astype(self._dtype)
        if self._dtype == jnp.float16:
            check_finite(cast, target, f"{self._folder}: float16 is too small, load it in bfloat16 or float32")
        return cast

    def _placed(self, target: str, array: np.ndarray) -> jax.Array:
        mesh, axes = self._mesh, self._binding.axes[target]
        where = sharding(mesh, axes, array.shape) if mesh is not None else None
        placed: jax.Array = jax.device_put(array, where, may_alias=True)  # on a CPU without a copy
        return placed

    def _compare(self, name: str, value: tuple[int, str]) -> None:
        if name in self._saved and differs(value, self._saved[name]):
            raise reading.damaged(self._folder, f"params: {name} is not as it was saved")
        self.sums[name] = value


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that `jax.device_put` need not copy on a CPU, as it begins at a multiple of 64 bytes."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + 64, np.uint8)
    first = -buffer.ctypes.data % 64
    array: np.ndarray = buffer[first : first + size].view(dtype).reshape(shape)
    return array


def abstract(config: ModelConfig, form: str | None) -> KangarooModel:
    """The model that `load` gives in `config.dtype`, quantised in `form`, with nothing allocated."""
    model = _abstract(config, form).unstack()
    for path, weight in nnx.to_flat_state(nnx.state(model)):
        if path[-1] != SCALE and not _keeps_its_dtype(weight.axes) and jnp.issubdtype(weight.dtype, jnp.floating):
            weight.set_value(jax.ShapeDtypeStruct(weight.shape, jnp.dtype(config.dtype)))
    return model


def _keeps_its_dtype(axes: tuple[str | None, ...]) -> bool:
    """Whether a parameter is the scale or bias of a norm."""
    return axes[-1:] == ("norm",)


def _abstract(config: ModelConfig, form: str | None) -> KangarooModel:
    """The model with nothing allocated, its decoder quantised in `form`."""
    model: KangarooModel = nnx.merge(*_traced(config))
    if form is not None:
        as_quantized(model.llm, form)
    return model


@functools.lru_cache(maxsize=4)
def _traced(config: ModelConfig) -> tuple[Any, Any]:
    """Graph and abstract weights of a model; tracing it takes a second."""
    return nnx.split(nnx.eval_shape(lambda: KangarooModel(config, rngs=nnx.Rngs(0))))


def _scale_of(kernel: str) -> str:
    return kernel.removesuffix(KERNEL) + SCALE
