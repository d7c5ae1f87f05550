"""The decoder: Llama 3 (Dubey et al. 2024). What its layers remember of earlier tokens is handed in."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int

from kangaroo_jax.config import LlamaConfig
from kangaroo_jax.conventions import Array
from kangaroo_jax.models.attention import attention
from kangaroo_jax.models.cut import RESIDUAL, spread, summed
from kangaroo_jax.models.layers import (
    Linear,
    RMSNorm,
    lookup,
    parameter,
    rotary_1d,
    rotate_half,
    truncated_normal,
)
from kangaroo_jax.models.quantized import KERNEL, linear_maps
from kangaroo_jax.models.stack import keep, run_layers, stack_layers
from kangaroo_jax.sharding import constrain

Rotary = tuple[Float[Array, "B T pairs"], Float[Array, "B T pairs"]]
QUERY = ("batch", "tokens", "activation_heads", None)
KEY = ("batch", "tokens", "activation_kv_heads", None)


SomeMemory = TypeVar("SomeMemory", bound="LayerMemory")


@runtime_checkable
class LayerMemory(Protocol):
    """What a layer remembers of earlier tokens; a pytree."""

    def update_and_attend(
        self: SomeMemory, query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], value: Float[Array, "B T K H"]
    ) -> tuple[Float[Array, "B T N H"], SomeMemory]:
        """Remember the keys and values of new tokens, and attend to all that their positions may see.

        Returns (context, what is remembered from now on).
        """


class Attention(nnx.Module):
    """Causal self-attention with grouped key-value heads and rotary positions."""

    def __init__(self, config: LlamaConfig, *, implementation: str, rngs: nnx.Rngs, param_dtype: DTypeLike):
        d, n, k, h = config.width, config.heads, config.kv_heads, config.head_dim
        options: dict[str, Any] = dict(bias=False, rngs=rngs, param_dtype=param_dtype)
        self.query = Linear((d,), (n, h), ("embed", "heads", "head_dim"), **options)
        self.key = Linear((d,), (k, h), ("embed", "kv_heads", "head_dim"), **options)
        self.value = Linear((d,), (k, h), ("embed", "kv_heads", "head_dim"), **options)
        scale = (2 * config.depth) ** -0.5
        self.out = Linear((n, h), (d,), ("heads", "head_dim", "embed"), scale=scale, **options)
        self.implementation = implementation

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotary: Rotary,
        segment_ids: Int[Array, "B T"] | None,
        memory: LayerMemory | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """(what x attends to, memory with the new tokens).

        Without a memory attention stays among x and inside its segments; with one, the memory says
        who sees whom.
        """
        query, key, value = spread(x, (self.query, self.key, self.value))
        query = keep(constrain(rotate_half(query, *rotary), QUERY), "query")
        key = keep(constrain(rotate_half(key, *rotary), KEY), "key")
        value = keep(constrain(value, KEY), "value")
        if memory is None:
            assert segment_ids is not None
            y = attention(
                query,
                key,
                value,
                segment_ids=(segment_ids, segment_ids),
                causal=True,
                implementation=self.implementation,
            )
        else:
            y, memory = memory.update_and_attend(query, key, value)
        return summed(y, self.out), memory


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        d, i = config.width, config.mlp_width
        options: dict[str, Any] = dict(bias=False, rngs=rngs, param_dtype=param_dtype)
        self.gate = Linear((d,), (i,), ("embed", "mlp"), **options)
        self.up = Linear((d,), (i,), ("embed", "mlp"), **options)
        self.down = Linear((i,), (d,), ("mlp", "embed"), scale=(2 * config.depth) ** -0.5, **options)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Each token by itself."""
        gate, up = spread(x, (self.gate, self.up))
        return summed(jax.nn.silu(keep(gate, "gate")) * keep(up, "up"), self.down)


class Layer(nnx.Module):
    """One pre-norm layer of the decoder."""

    def __init__(self, config: LlamaConfig, *, implementation: str, rngs: nnx.Rngs, param_dtype: DTypeLike):
        norm: dict[str, Any] = dict(eps=config.norm_eps, rngs=rngs, param_dtype=param_dtype)
        self.attention_norm = RMSNorm(config.width, **norm)
        self.attention = Attention(config, implementation=implementation, rngs=rngs, param_dtype=param_dtype)
        self.mlp_norm = RMSNorm(config.width, **norm)
        self.mlp = MLP(config, rngs=rngs, param_dtype=param_dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotary: Rotary,
        segment_ids: Int[Array, "B T"] | None,
        memory: LayerMemory | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """(x after this layer, memory with the new tokens); see `Attention`."""
        y, memory = self.attention(self.attention_norm(x), rotary, segment_ids, memory)
        x = constrain(x + y, RESIDUAL)
        return constrain(x + self.mlp(self.mlp_norm(x)), RESIDUAL), memory


def contracted_of(config: LlamaConfig) -> dict[str, int]:
    """Path of each kernel of a decoder's linear maps, as in a checkpoint -> how many of its dimensions are inputs."""
    decoder = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    return {f"llm/{path}/{KERNEL}": module.contracted for path, module in linear_maps(decoder)}


class Llama(nnx.Module):
    """Token embedding, the layers, the final norm and a head, which may be the token embedding (`head` is None).

    Raises UserError, when called, for an attention implementation that does not run here.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        scan: bool = True,
        attention: str = "auto",
    ):
        d, v = config.width, config.vocab_size
        init = truncated_normal(d**-0.5)
        self.embedding = parameter(init, (v, d), ("vocab", "embed"), rngs=rngs, dtype=param_dtype)
        self.embedding_scale: nnx.Param[jax.Array] | None = nnx.data(None)  # where it is quantised, see `quantized`
        self.layers: Layer | nnx.List[Layer] = stack_layers(
            lambda rngs: Layer(config, implementation=attention, rngs=rngs, param_dtype=param_dtype),
            config.depth,
            rngs=rngs,
        )
        self.norm = RMSNorm(d, eps=config.norm_eps, rngs=rngs, param_dtype=param_dtype)
        options: dict[str, Any] = dict(bias=False, rngs=rngs, param_dtype=param_dtype)
        self.head = None if config.tied_head else Linear((d,), (v,), ("embed", "vocab"), **options)
        self.depth, self.kv_heads, self.head_dim = config.depth, config.kv_heads, config.head_dim
        self.rope_theta, self.remat, self.loss_chunk = config.rope_theta, config.remat, config.loss_chunk
        self.rope_scaling = config.rope_scaling
        self.scan, self.dtype = scan, jnp.dtype(dtype)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeddings in the computation's dtype."""
        x = lookup(self.embedding[...], tokens, self.dtype)
        if self.embedding_scale is not None:
            x *= self.embedding_scale[...][tokens][..., None].astype(x.dtype)
        return constrain(x, RESIDUAL)

    def table(self, dtype: DTypeLike) -> Float[Array, "V D"]:
        """The token embedding in `dtype`, of a quantised one what it stands for."""
        table: jax.Array = self.embedding[...]
        if self.embedding_scale is None:
            return table.astype(dtype)
        return table.astype(dtype) * self.embedding_scale[...][:, None].astype(dtype)

    def __call__(
        self, embeddings: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm.

        Attention is causal by index and stays inside a segment.
        """
        rotary = rotary_1d(positions, self.head_dim, self.rope_theta, self.rope_scaling)

        def step(layer: Layer, x: Float[Array, "B T D"], _: Array) -> Float[Array, "B T D"]:
            return layer(x, rotary, segment_ids)[0]

        x = constrain(embeddings.astype(self.dtype), RESIDUAL)
        return self.norm(run_layers(self.layers, step, x, scan=self.scan, remat=self.remat))

    def read(
        self, embeddings: Float[Array, "B T D"], positions: Int[Array, "B T"], memories: Sequence[SomeMemory]
    ) -> tuple[Float[Array, "B T D"], list[SomeMemory]]:
        """Tokens after those that each layer remembers, through layers that are unstacked (`stack.unstack_layers`).

        Returns (hidden states after the final norm, the layers' memories).
        Raises ValueError where the layers are stacked.
        """
        if not isinstance(self.layers, nnx.List):
            raise ValueError("tokens after others are read by layers that are unstacked")
        rotary = rotary_1d(positions, self.head_dim, self.rope_theta, self.rope_scaling)
        x, remembered = constrain(embeddings.astype(self.dtype), RESIDUAL), []
        for layer, memory in zip(self.layers, memories, strict=True):
            x, memory = layer(x, rotary, None, memory)
            remembered.append(memory)
        return self.norm(x), remembered

    def unembed(self, hidden: Float[Array, "*batch D"]) -> Float32[Array, "*batch V"]:
        """Logits."""
        if self.head is None:
            return jnp.einsum("...d,vd->...v", hidden, self.table(hidden.dtype), preferred_element_type=jnp.float32)
        kernel = self.head.weight(hidden.dtype)
        return self.head.scaled(jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32))
