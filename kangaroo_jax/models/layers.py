"""What more than one model uses: parameters, linear maps, norms and rotary position embeddings."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int, Real

from kangaroo_jax.config import RopeScaling
from kangaroo_jax.conventions import Array
from kangaroo_jax.models.quantized import unpack
from kangaroo_jax.sharding import (
    divides,
    exchange,
    fitting,
    gather,
    index_on,
    joined,
    per_device,
    platform,
    shards,
    split_mesh,
    sum_over,
)

Axes = tuple[str | None, ...]
Table = Array | np.ndarray
NOT_SCALED = RopeScaling()
LANES = 128  # of a TPU's vector registers


def truncated_normal(std: float) -> jax.nn.initializers.Initializer:
    """Normal of standard deviation `std`, cut at two deviations (and widened to make up for the cut)."""
    return jax.nn.initializers.truncated_normal(std / 0.87962566103423978, lower=-2.0, upper=2.0)


def constant(value: float) -> jax.nn.initializers.Initializer:
    """Every element is `value`."""
    return jax.nn.initializers.constant(value)


def parameter(
    init: Callable[..., jax.Array], shape: Sequence[int], axes: Axes, *, rngs: nnx.Rngs, dtype: DTypeLike
) -> nnx.Param[jax.Array]:
    """A weight with a logical name for every dimension; ValueError where their numbers differ."""
    if len(shape) != len(axes):
        raise ValueError(f"a parameter of shape {tuple(shape)} needs {len(shape)} logical axes, not {axes}")
    return nnx.Param(init(rngs.params(), tuple(shape), dtype), axes=tuple(axes))


class Linear(nnx.Module):
    """y[..., outputs] = sum over inputs of x[..., inputs] * kernel[inputs, outputs] (+ bias[outputs]).

    `inputs` and `outputs` may each be several dimensions, for example D -> (N, H). The kernel starts
    as a truncated normal of deviation `scale / sqrt(fan in)`, the bias as zeros; both are cast to the
    dtype of x where they are used. A kernel may be quantised, with a `kernel_scale` beside it; see `quantized`.
    It may have low-rank factors beside it, whose product is added to it; see `lora`.
    """

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        axes: Axes,
        *,
        bias: bool,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        scale: float = 1.0,
    ):
        init = truncated_normal(scale / float(np.prod(inputs)) ** 0.5)
        self.kernel = parameter(init, (*inputs, *outputs), axes, rngs=rngs, dtype=param_dtype)
        if bias:
            self.bias = parameter(constant(0.0), outputs, axes[len(inputs) :], rngs=rngs, dtype=param_dtype)
        self.kernel_scale: nnx.Param[jax.Array] | None = nnx.data(None)
        self.lora_a: nnx.Param[jax.Array] | None = nnx.data(None)
        self.lora_b: nnx.Param[jax.Array] | None = nnx.data(None)
        self.lora_scale = 1.0
        self.has_bias, self.axes = bias, tuple(axes)
        self.contracted = len(inputs)

    def weight(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """The kernel [inputs, outputs] in `dtype`; what is multiplied with it is then to be `scaled`."""
        kernel = self.kernel[...]
        if self.kernel_scale is not None and kernel.dtype != jnp.int8:
            unpacked: jax.Array = unpack(kernel, self.kernel_scale[...], self.contracted, dtype)
            return unpacked
        return kernel.astype(dtype)

    def scaled(self, y: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """A product [..., outputs] with `weight`, by the scale of each output where the kernel has one."""
        if self.kernel_scale is None or self.kernel[...].dtype != jnp.int8:
            return y
        return y * self.kernel_scale[...].astype(y.dtype)

    @property
    def bare(self) -> bool:
        """Whether the kernel is all that it has: neither a bias nor a scale, nor what was added to it later."""
        return self.plain and not self.has_bias

    @property
    def plain(self) -> bool:
        """Whether the kernel is all that x is multiplied with: not quantised, and without low-rank factors."""
        return self.kernel_scale is None and self.lora_a is None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """x [..., inputs] -> [..., outputs] in the dtype of x."""
        y = self._multiplied(x)
        return y + self.bias[...].astype(x.dtype) if self.has_bias else y

    def kernel_for(self, x: Float[Array, "..."], scale: Array | None = None) -> Float[Array, "..."]:
        """What x is multiplied with: joined over the mesh where tokens are cut, if x is the larger of the two.

        The smaller moves: in generation, a token at a time, that is x. `scale`: of each input, where there is one.
        """
        kernel = self.weight(x.dtype if scale is None else jnp.float32)
        if scale is not None:
            kernel = (kernel * scale.astype(jnp.float32)[:, None]).astype(x.dtype)
        if shards("tokens") > 1 and x.size >= kernel.size:
            kernel = checkpoint_name(joined(kernel, self.axes), "weight")
        return kernel

    def _multiplied(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Without the bias."""
        y = self.scaled(product(x, self.kernel_for(x), self.contracted))
        if self.lora_a is not None and self.lora_b is not None:
            a, b = (factor[...].astype(x.dtype) for factor in (self.lora_a, self.lora_b))
            if shards("tokens") > 1:
                a = joined(a, (*self.axes[: self.contracted], None))
                b = joined(b, (None, *self.axes[self.contracted :]))
            y += product(product(x, a, self.contracted), b, 1) * self.lora_scale
        return y


def side_by_side(maps: Sequence[Linear], x: Float[Array, "..."], width: int) -> Float[Array, "..."]:
    """x [..., inputs] -> what several maps make of it, `width` outputs of each taking turns, [..., all outputs].

    It is one product, which reads x once, as its gradient does. XLA for TPUs would multiply the gradient by a kernel of
    [inputs, N, H] head by head, after a copy that turns it.
    """
    contracted = maps[0].contracted

    def turns(parts: Sequence[Array], leading: int) -> Array:
        kept = parts[0].shape[:leading]
        return jnp.stack([part.reshape(*kept, -1, width) for part in parts], axis=-2).reshape(*kept, -1)

    if not all(each.plain for each in maps):
        return turns([each(x) for each in maps], x.ndim - contracted)
    y = product(x, turns([each.kernel_for(x) for each in maps], contracted), contracted)
    biases = [each.bias[...] if each.has_bias else jnp.zeros(each.kernel.shape[contracted:], y.dtype) for each in maps]
    return y + turns(biases, 0).astype(x.dtype)


def product(x: Array, kernel: Array, contracted: int) -> Array:
    """`tensordot` over the last dimensions of x and the first of the kernel, as the platform differentiates it best."""
    return _product(x, kernel, contracted) if platform() == "cpu" else jnp.tensordot(x, kernel, contracted)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, kernel: Array, contracted: int) -> Array:
    """`tensordot` whose gradient by the kernel is x's transpose times that of y, in this order.

    JAX's own rule takes the product the other way round and turns the result. XLA then turns the gradient of y for a
    CPU, element by element amid the computation that makes it: an eighth of the time of a step of 100M parameters.
    """
    return _summed(x, kernel, contracted)


def _summed(x: Array, y: Array, axes: Any) -> Array:
    """`tensordot` in the dtype of x, summed in float32, which XLA asks for to use a CPU's own products of bfloat16."""
    return jnp.tensordot(x, y, axes, preferred_element_type=jnp.float32).astype(x.dtype)


def _product_forward(x: Array, kernel: Array, contracted: int) -> tuple[Array, tuple[Array, Array]]:
    return _summed(x, kernel, contracted), (x, kernel)  # itself, so that a remat policy sees the product


def _product_backward(contracted: int, residuals: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    rows, outputs = list(range(x.ndim - contracted)), list(range(contracted, kernel.ndim))
    d_x = _summed(d_y, kernel, (list(range(len(rows), d_y.ndim)), outputs))
    return d_x, _summed(x, d_y, (rows, rows))


_product.defvjp(_product_forward, _product_backward)


def lookup(table: Real[Array, "V D"], tokens: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
    """Rows of `table` for `tokens`, in `dtype`.

    On a mesh no device gathers the table: each looks up its vocabulary and its part of D for all tokens of
    the group that D is cut over, and they exchange parts of D for tokens.
    """
    token_axes = ("batch", "tokens")
    if split_mesh() is None or not divides(tokens.shape, token_axes):
        return table[tokens].astype(dtype)
    vocab, embed = fitting(table.shape, ("vocab", "embed"))

    def local(table: Real[Array, "v d"], tokens: Int[Array, "b t"]) -> Float[Array, "b t D"]:
        all_tokens = gather(tokens.reshape(-1), embed, 0)
        rows = table.shape[0]
        first = index_on(vocab) * rows if shards(vocab) > 1 else 0
        local = all_tokens - first
        mine = (local >= 0) & (local < rows)
        part = jnp.where(mine[:, None], table[jnp.clip(local, 0, rows - 1)], 0).astype(dtype)
        part = exchange(sum_over(part, vocab), embed, split=0, join=1)
        return part.reshape(*tokens.shape, -1)

    rows: jax.Array = per_device(local, ((vocab, embed), token_axes), (*token_axes, None))(table, tokens)
    return rows


class LayerNorm(nnx.Module):
    """Layer normalisation over the last dimension (Ba et al. 2016), computed in float32."""

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs, param_dtype: DTypeLike):
        self.scale = parameter(constant(1.0), (width,), ("norm",), rngs=rngs, dtype=param_dtype)
        self.bias = parameter(constant(0.0), (width,), ("norm",), rngs=rngs, dtype=param_dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """In the dtype of x."""
        y = x.astype(jnp.float32)
        mean, inverse = self._statistics(y)
        y = (y - mean) * inverse
        y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)

    def _statistics(self, y: Float32[Array, "*batch D"]) -> tuple[Array, Array]:
        """Mean and inverse deviation, each [..., 1]."""
        mean = jnp.mean(y, axis=-1, keepdims=True)
        if platform() == "tpu":  # both sums in one pass, which may be that of the product before
            variance = jnp.maximum(jnp.mean(jnp.square(y), axis=-1, keepdims=True) - jnp.square(mean), 0.0)
        else:
            variance = jnp.mean(jnp.square(y - mean), axis=-1, keepdims=True)
        return mean, jax.lax.rsqrt(variance + self.eps)

    def before(self, linear: Linear, x: Float[Array, "*batch D"]) -> Float[Array, "..."]:
        """`linear(self(x))`, which on TPUs is normalised after the product.

        The scale is multiplied into the kernel, and the bias makes one output for all x. So what is normalised is never
        written, and the gradients of scale and bias come from the kernel's, not from sums over all of x.
        """
        if platform() != "tpu" or not linear.plain:
            return linear(self(x))
        mean, inverse = self._statistics(x.astype(jnp.float32))
        kernel = linear.kernel_for(x, self.scale[...])
        y = jnp.tensordot(x, kernel, 1, preferred_element_type=jnp.float32)
        y = (y - mean * jnp.sum(kernel.astype(jnp.float32), axis=0)) * inverse
        y += jnp.sum(linear.weight(jnp.float32) * self.bias[...].astype(jnp.float32)[:, None], axis=0)
        return (y + linear.bias[...].astype(jnp.float32) if linear.has_bias else y).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last dimension (Zhang and Sennrich 2019), computed in float32."""

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs, param_dtype: DTypeLike):
        self.scale = parameter(constant(1.0), (width,), ("norm",), rngs=rngs, dtype=param_dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """In the dtype of x."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def rotary_1d(
    positions: Int[Array, "B T"], head_dim: int, theta: float, scaling: RopeScaling = NOT_SCALED
) -> tuple[Float[Array, "B T pairs"], Float[Array, "B T pairs"]]:
    """Cosines and sines of Llama's rotary embedding (Su et al. 2021): the angle of pair i is position * frequency i.

    Angles are counted in parts of a turn, as integers that wrap, so that they are within 1e-6 of the formula up to
    position 2^21. A product of float32 would be 0.016 off at position 466,944, the end of an hour.
    """
    parts = rotary_frequencies(head_dim, theta, scaling) / (2 * np.pi) * 2.0**32  # of a turn, a position
    whole = np.floor(parts).astype(np.uint32)
    rest = np.round((parts - np.floor(parts)) * 2.0**11).astype(np.uint32)  # times a position, below 2^32
    counted = positions.astype(jnp.uint32)[..., None]
    turned = counted * whole + ((counted * rest) >> 11)
    angles = turned.astype(jnp.int32).astype(jnp.float32) * np.float32(2 * np.pi / 2.0**32)  # in [-pi, pi]
    return jnp.cos(angles), jnp.sin(angles)


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling = NOT_SCALED) -> Float[np.ndarray, " pairs"]:
    """theta^(-2i / H) for the H / 2 pairs, slowed down as Llama 3.1 does for longer contexts (Dubey et al. 2024).

    A pair that turns more than `high_freq_factor` times within `original_length` tokens keeps its
    frequency, one that turns less than `low_freq_factor` times is slowed down by `factor`, and
    between the two the frequency is interpolated.
    """
    frequencies: np.ndarray = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if scaling.factor == 1.0:
        return frequencies
    turns = scaling.original_length * frequencies / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotary_2d(
    grid: int, head_dim: int, theta: float, reference_grid: int
) -> tuple[Float[np.ndarray, "P pairs"], Float[np.ndarray, "P pairs"]]:
    """Cosines and sines of EVA-02's rotary embedding of a square grid of P = grid^2 patches.

    H/4 pairs turn with the row, then H/4 with the column. Positions run
    from 0 to `reference_grid` whatever the grid, so that a larger image stays in the trained range.
    Raises ValueError where the head width is no multiple of four.
    """
    if head_dim % 4:
        raise ValueError(f"2D rotary embedding: head width {head_dim} must be a multiple of 4")
    half = head_dim // 2
    frequencies = theta ** -(np.arange(0, half, 2) / half)
    angles = np.outer(np.arange(grid) / grid * reference_grid, frequencies)
    rows = np.broadcast_to(angles[:, None], (grid, grid, half // 2))
    columns = np.broadcast_to(angles[None, :], (grid, grid, half // 2))
    table = np.concatenate([rows, columns], axis=-1).reshape(grid * grid, half)
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)


def rotate_half(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T H//2"], sin: Float[Array, "B T H//2"]
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (i, i + H/2) of x (Llama as on Hugging Face)."""
    if platform() == "tpu":
        cos, sin = (jnp.concatenate([table, table], axis=-1) for table in (cos, sin))
        return _turn(x, cos, sin, x.shape[-1] // 2)
    cos, sin = (jnp.expand_dims(table, -2).astype(x.dtype) for table in (cos, sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotate_pairs(
    x: Float[Array, "B P N H"], cos: Float[Table, "P H//2"], sin: Float[Table, "P H//2"]
) -> Float[Array, "B P N H"]:
    """Rotate the neighbours (2i, 2i + 1) of x (EVA-02)."""
    if platform() == "tpu":
        cos, sin = (jnp.repeat(jnp.asarray(table), 2, axis=-1) for table in (cos, sin))
        return _turn(x, cos, sin, 1)
    cos, sin = (jnp.expand_dims(jnp.asarray(table), -2).astype(x.dtype) for table in (cos, sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)


def _turn(x: Float[Array, "B T N H"], cos: Float[Array, "*rows H"], sin: Float[Array, "*rows H"], apart: int) -> Array:
    """Rotate pairs of elements that stand `apart`, by a cosine and a sine for each of the two.

    A TPU moves elements among its lanes at a fifth of the memory's speed. Each element's partner is found by a
    product with a matrix of 0, 1 and -1, which is exact, of two heads at a time where they have half of the lanes.
    """
    width = x.shape[-1]
    heads = 2 if width == LANES // 2 and x.shape[-2] % 2 == 0 else 1
    swaps = jnp.asarray(np.kron(np.eye(heads), _partners(width, apart)), x.dtype)
    cos, sin = (jnp.expand_dims(jnp.tile(table, heads), -2).astype(x.dtype) for table in (cos, sin))
    wide = x.reshape(*x.shape[:-2], -1, heads * width)
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return (wide * cos + jnp.dot(wide, swaps, precision=exact) * sin).reshape(x.shape)


@functools.cache
def _partners(width: int, apart: int) -> Float32[np.ndarray, "{width} {width}"]:
    """The matrix that gives, for the first of each pair, its partner negated, for the second its partner."""
    swaps = np.zeros((width, width), np.float32)
    for first in (i for i in range(width) if i // apart % 2 == 0):
        swaps[first + apart, first], swaps[first, first + apart] = -1.0, 1.0
    return swaps
