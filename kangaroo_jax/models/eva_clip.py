"""The vision encoder: EVA-02 as used by EVA-CLIP (Fang et al. 2023, Sun et al. 2023)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Shaped, UInt8

from kangaroo_jax.config import VisionConfig
from kangaroo_jax.conventions import Array
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.attention import attention, attention_of_frames, padding, whole_frames
from kangaroo_jax.models.layers import (
    LayerNorm,
    Linear,
    parameter,
    rotary_2d,
    rotate_pairs,
    side_by_side,
    truncated_normal,
)
from kangaroo_jax.models.stack import keep, run_layers, stack_layers
from kangaroo_jax.sharding import constrain

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP, for RGB from 0 to 1
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
Frames = UInt8[Array, "n S S 3"] | Float[Array, "n S S 3"]  # floats are normalised already
Rotary = tuple[Float[np.ndarray, "tokens pairs"], Float[np.ndarray, "tokens pairs"]]
ACTIVATION = ("frames", None, "activation")


class Attention(nnx.Module):
    """Full self-attention over a frame's patches and CLS, with a LayerNorm before the output projection."""

    def __init__(self, config: VisionConfig, *, implementation: str, rngs: nnx.Rngs, param_dtype: DTypeLike):
        d, n = config.width, config.heads
        h = d // n
        axes = ("vision_embed", "vision_heads", "head_dim")
        options: dict[str, Any] = dict(rngs=rngs, param_dtype=param_dtype)
        self.query = Linear((d,), (n, h), axes, bias=True, **options)
        self.key = Linear((d,), (n, h), axes, bias=False, **options)
        self.value = Linear((d,), (n, h), axes, bias=True, **options)
        self.norm = LayerNorm(d, eps=config.norm_eps, **options)
        scale = (2 * config.depth) ** -0.5
        self.out = Linear((d,), (d,), ("vision_heads", "vision_embed"), bias=True, scale=scale, **options)
        self.implementation = implementation

    def __call__(self, x: Float[Array, "n tokens D"], rotary: Rotary) -> Float[Array, "n tokens D"]:
        """The 1 + P tokens of each frame, CLS first.

        Where the kernel takes rows of whole blocks only, zeros are added to x, which is cheaper than to queries, keys
        and values apart, in heads that fill half of a TPU's lanes.
        """
        tokens, segments = x.shape[1], None
        if more := padding(self.implementation, tokens, self.query.kernel.shape[-1]):
            x = jnp.pad(x, [(0, 0), (0, more), (0, 0)])
            cos, sin = rotary
            rotary = np.pad(cos, ((0, more), (0, 0)), constant_values=1.0), np.pad(sin, ((0, more), (0, 0)))
            ids = jnp.broadcast_to(jnp.arange(tokens + more) >= tokens, x.shape[:2]).astype(jnp.int32)
            segments = (ids, ids)
        if turns := whole_frames(self.implementation, x.shape[1], self.query.kernel.shape[-2:]):
            taken = keep(side_by_side((self.query, self.key, self.value), x, turns), "query")
            y = keep(attention_of_frames(taken, *rotary, tokens)[:, :tokens], "context")
        else:
            query = keep(rotate_pairs(self.query(x), *rotary), "query")
            key = keep(rotate_pairs(self.key(x), *rotary), "key")
            value = keep(self.value(x), "value")
            how: dict[str, Any] = dict(implementation=self.implementation, layout="frames")
            y = attention(query, key, value, segment_ids=segments, causal=False, **how).reshape(x.shape)[:, :tokens]
        return self.out(self.norm(y))


class MLP(nnx.Module):
    """SwiGLU with a LayerNorm on the hidden activations: down(norm(silu(gate(x)) * up(x)))."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        d, i = config.width, config.mlp_width
        options: dict[str, Any] = dict(rngs=rngs, param_dtype=param_dtype)
        self.gate = Linear((d,), (i,), ("vision_embed", "vision_mlp"), bias=True, **options)
        self.up = Linear((d,), (i,), ("vision_embed", "vision_mlp"), bias=True, **options)
        self.norm = LayerNorm(i, eps=config.norm_eps, **options)
        scale = (2 * config.depth) ** -0.5
        self.down = Linear((i,), (d,), ("vision_mlp", "vision_embed"), bias=True, scale=scale, **options)

    def __call__(self, x: Float[Array, "n tokens D"]) -> Float[Array, "n tokens D"]:
        """The 1 + P tokens of each frame."""
        gate, up = keep(self.gate(x), "gate"), keep(self.up(x), "up")
        return self.norm.before(self.down, jax.nn.silu(gate) * up)


class Block(nnx.Module):
    """One pre-norm layer of the encoder."""

    def __init__(self, config: VisionConfig, *, implementation: str, rngs: nnx.Rngs, param_dtype: DTypeLike):
        options: dict[str, Any] = dict(rngs=rngs, param_dtype=param_dtype)
        self.attention_norm = LayerNorm(config.width, eps=config.norm_eps, **options)
        self.attention = Attention(config, implementation=implementation, **options)
        self.mlp_norm = LayerNorm(config.width, eps=config.norm_eps, **options)
        self.mlp = MLP(config, **options)

    def __call__(self, x: Float[Array, "n tokens D"], rotary: Rotary) -> Float[Array, "n tokens D"]:
        """The 1 + P tokens of each frame, CLS first."""
        x = constrain(x + self.attention(self.attention_norm(x), rotary), ACTIVATION)
        return constrain(x + self.mlp(self.mlp_norm(x)), ACTIVATION)


class EvaClip(nnx.Module):
    """The encoder for square frames whose side is a multiple of the patch.

    Raises ValueError for a width that its heads do not divide.
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        scan: bool = True,
        attention: str = "auto",
    ):
        d, p = config.width, config.patch_size
        if d % config.heads:
            raise ValueError(f"vision width {d} does not divide by its {config.heads} heads")
        options: dict[str, Any] = dict(rngs=rngs, param_dtype=param_dtype)
        self.patch_embedding = Linear((p * p * 3,), (d,), ("patch", "vision_embed"), bias=True, **options)
        init = truncated_normal(0.02)
        self.cls_token = parameter(init, (d,), ("vision_embed",), rngs=rngs, dtype=param_dtype)
        self.position_embedding = parameter(
            init, (1 + config.pos_embed_grid**2, d), ("patch", "vision_embed"), rngs=rngs, dtype=param_dtype
        )
        self.blocks = stack_layers(
            lambda rngs: Block(config, implementation=attention, rngs=rngs, param_dtype=param_dtype),
            config.depth,
            rngs=rngs,
        )
        self.norm = LayerNorm(d, eps=config.norm_eps, **options)
        self.patch_size, self.pos_embed_grid, self.head_dim = p, config.pos_embed_grid, d // config.heads
        self.rope_theta, self.rope_reference_grid = config.rope_theta, config.rope_reference_grid
        self.output_norm, self.remat = config.output_norm, config.remat
        self.scan, self.dtype = scan, jnp.dtype(dtype)

    def __call__(self, frames: Frames) -> Float[Array, "n P D"]:
        """Patch tokens of frames, CLS dropped, normalised where `output_norm` says so."""
        x = self.tokens(frames)
        return (self.norm(x) if self.output_norm else x)[:, 1:]

    def tokens(self, frames: Frames) -> Float[Array, "n tokens D"]:
        """The 1 + P tokens of frames before the final norm, CLS first.

        Raises UserError where the side of the frames is no multiple of the patch.
        """
        patches = self._patches(frames)
        patches = normalise(patches) if frames.dtype == jnp.uint8 else patches
        x = self.patch_embedding(patches.reshape(*patches.shape[:2], -1).astype(self.dtype))
        grid = frames.shape[1] // self.patch_size
        cls = jnp.broadcast_to(self.cls_token[...].astype(self.dtype), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], axis=1) + self.positions(grid).astype(self.dtype)
        cos, sin = rotary_2d(grid, self.head_dim, self.rope_theta, self.rope_reference_grid)
        cos, sin = np.pad(cos, ((1, 0), (0, 0)), constant_values=1.0), np.pad(sin, ((1, 0), (0, 0)))  # CLS stays

        def step(block: Block, x: Float[Array, "n tokens D"], index: Array) -> Float[Array, "n tokens D"]:
            return block(x, (cos, sin))

        return run_layers(self.blocks, step, constrain(x, ACTIVATION), scan=self.scan, remat=self.remat)

    def positions(self, grid: int) -> Float[Array, "1+{grid}**2 D"]:
        """The position embedding, resized (bicubic, antialiased) from the stored grid; CLS kept."""
        stored = self.position_embedding[...]
        if grid == self.pos_embed_grid:
            return stored
        matrix = jnp.asarray(resize_matrix(self.pos_embed_grid, grid))
        return jnp.concatenate([stored[:1], (matrix @ stored[1:].astype(jnp.float32)).astype(stored.dtype)])

    def _patches(self, frames: Shaped[Array, "n S S 3"]) -> Shaped[Array, "n P patch patch 3"]:
        """Row by row."""
        n, side, _, channels = frames.shape
        if side % self.patch_size:
            raise UserError(f"frames of {side} pixels: choose data.image_size as a multiple of {self.patch_size}")
        grid = side // self.patch_size
        x = frames.reshape(n, grid, self.patch_size, grid, self.patch_size, channels)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, grid * grid, self.patch_size, self.patch_size, channels)


def normalise(frames: UInt8[Array, "*batch 3"]) -> Float32[Array, "*batch 3"]:
    """Frames in RGB with CLIP's mean and deviation."""
    scale, offset = 1 / (255 * np.asarray(PIXEL_STD)), np.asarray(PIXEL_MEAN) / np.asarray(PIXEL_STD)
    normalised: jax.Array = frames.astype(jnp.float32) * scale.astype(np.float32) - offset.astype(np.float32)
    return normalised


@functools.cache
def resize_matrix(source: int, target: int) -> Float32[np.ndarray, "{target}**2 {source}**2"]:
    """Bicubic resize of a square grid, as torch does it with antialias.

    Keys' cubic kernel with a = -0.5, pixel centres at half integers, widened by the ratio where the
    grid shrinks; weights of a pixel near the border are normalised over what lies inside.
    """
    scale = source / target
    support = max(scale, 1.0)
    centres = (np.arange(target) + 0.5) * scale
    distance = np.abs((np.arange(source) + 0.5 - centres[:, None]) / support)
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1.0
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4.0 * distance + 2.0
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.asarray(np.kron(weights, weights), np.float32)
