"""The whole model, read like the architecture figure of Kangaroo (arXiv 2408.15542).

frames -> ViT -> + time -> 3D patchify -> projector -> vision tokens, which stand among the text -> decoder
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int, UInt8

from kangaroo_jax.config import ModelConfig
from kangaroo_jax.conventions import Array, PackedBatch
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.cut import RESIDUAL
from kangaroo_jax.models.eva_clip import EvaClip
from kangaroo_jax.models.layers import parameter, truncated_normal
from kangaroo_jax.models.llama import Llama
from kangaroo_jax.models.losses import chunked_cross_entropy
from kangaroo_jax.models.patchify import Patchify, Projector, time_encoding
from kangaroo_jax.models.quantized import dense
from kangaroo_jax.models.stack import unstack_layers
from kangaroo_jax.sharding import constrain, shards

FRAMES = ("frames", None, "activation")
MARKS = ("vi_start", "eof", "eov", "vi_end")  # rows of special_embedding, in this order


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of each part of the model (and their `total`), counted without allocating any."""
    model = nnx.eval_shape(lambda: KangarooModel(config, rngs=nnx.Rngs(0)))
    counts: dict[str, int] = {}
    for path, weight in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        part = str(path[0])
        counts[part] = counts.get(part, 0) + int(np.prod(weight.shape))
    return {**counts, "total": sum(counts.values())}


class KangarooModel(nnx.Module):
    """Vision encoder, temporal position encoding, patchify, projector and decoder.

    Weights are `param_dtype`; the computation runs in `config.dtype`, to which weights are cast where used.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32):
        vision, llm = config.vision, config.llm
        options: dict[str, Any] = dict(rngs=rngs, param_dtype=param_dtype)
        shared: dict[str, Any] = dict(dtype=config.dtype, scan=config.scan, attention=config.attention, **options)
        self.vision = EvaClip(vision, **shared)
        self.patchify = Patchify(config.patchify, vision.width, **options)  # there also where it is bypassed
        self.projector = Projector(config.projector, vision.width, llm.width, **options)
        self.llm = Llama(llm, **shared)
        self.special_embedding = parameter(
            truncated_normal(llm.width**-0.5), (len(MARKS), llm.width), (None, "embed"), rngs=rngs, dtype=param_dtype
        )
        self.special_ids = tuple(getattr(config.special_ids, name) for name in MARKS)
        self.joins_frames = config.patchify.enabled
        self.time_theta = config.tpe.theta if config.tpe.enabled else None

    def unstack(self) -> "KangarooModel":
        """Give each layer of the decoder weights of its own, in place, for generation; the model itself."""
        if not isinstance(self.llm.layers, nnx.List):
            self.llm.layers = unstack_layers(self.llm.layers)
        return self

    def encode(self, frames: UInt8[Array, "B F S S 3"], frame_times: Float[Array, "B F"]) -> Float[Array, "B R D"]:
        """Frames and their times in seconds -> vision tokens.

        Raises UserError where S is no multiple of the patch, or F none of the frames a group.
        """
        b, f, *picture = frames.shape
        k = self.patchify.kernel_size[0] if self.joins_frames else 1
        if f % k:
            raise UserError(f"{f} frames a pack: choose data.frames_per_pack as a multiple of {k}")
        surplus = -(b * f) % (k * shards("frames"))  # so that every device has equally many groups
        frames, seconds = frames.reshape(b * f, *picture), frame_times.reshape(b * f)
        if surplus:
            frames, seconds = jnp.pad(frames, [(0, surplus)] + [(0, 0)] * 3), jnp.pad(seconds, (0, surplus))
        x = self.vision(constrain(frames, ("frames", None, None, None)))
        grid, width = picture[0] // self.vision.patch_size, x.shape[-1]
        if self.time_theta is not None:
            time = time_encoding(seconds, width, self.time_theta)
            x = x + time[:, None].astype(x.dtype)
        if self.joins_frames:
            x = self.patchify(x.reshape(-1, k, grid, grid, width))
        x = self.projector(constrain(x.reshape((b * f + surplus) // k, -1, width), FRAMES))
        x = constrain(x, FRAMES)[: b * f // k].reshape(b, -1, x.shape[-1])
        return constrain(x, ("batch", None, "activation"))

    def embed(
        self, tokens: Int[Array, "B T"], vision_index: Int[Array, "B T"], vision: Float[Array, "B R D"] | None
    ) -> Float[Array, "B T D"]:
        """Tokens, and the rows of the vision tokens that stand among them -> embeddings.

        Where vision_index is not -1 the vision token of that row stands; the four marks around a video
        have embeddings of their own, which train even where the decoder is frozen.
        """
        x = self.llm.embed(tokens)
        for row, mark in enumerate(self.special_ids):
            x = jnp.where((tokens == mark)[..., None], self.special_embedding[...][row].astype(x.dtype), x)
        if vision is None:
            return x
        index = constrain(jnp.maximum(vision_index, 0), RESIDUAL[:2])
        rows = constrain(jnp.take_along_axis(vision, index[..., None], axis=1), RESIDUAL)
        return jnp.where((vision_index >= 0)[..., None], rows.astype(x.dtype), x)

    def unembed(self, hidden: Float[Array, "*batch D"]) -> Float32[Array, "*batch V"]:
        """Logits. In a tied head the marks have their own rows, too, as in the token embedding of an export."""
        logits = self.llm.unembed(hidden)
        if self.llm.head is not None:
            return logits
        rows = self.special_embedding[...].astype(hidden.dtype)
        marks = jnp.einsum("...d,md->...m", hidden, rows, preferred_element_type=jnp.float32)
        token = np.arange(logits.shape[-1])
        for row, mark in enumerate(self.special_ids):
            logits = jnp.where(token == mark, marks[..., row, None], logits)
        return logits

    def _head(self) -> Float[Array, "D V"]:
        """The head's kernel. The marks of a tied one learn by their embeddings alone, as no answer holds a mark: where
        the decoder is frozen, the head needs no gradient."""
        if self.llm.head is not None:
            kernel: jax.Array = self.llm.head.kernel[...]
            if (scale := self.llm.head.kernel_scale) is not None:
                kernel = dense(kernel, scale[...], self.llm.head.contracted, self.llm.dtype)
            return kernel
        table = self.llm.embedding[...] if self.llm.embedding_scale is None else self.llm.table(self.llm.dtype)
        marks = jax.lax.stop_gradient(self.special_embedding[...]).astype(table.dtype)
        token = np.arange(table.shape[0])[:, None]
        for row, mark in enumerate(self.special_ids):
            table = jnp.where(token == mark, marks[row], table)
        return table.T

    def hidden(self, batch: PackedBatch) -> Float[Array, "B T D"]:
        """The decoder's states after its final norm."""
        vision = None
        if batch.frames.shape[1]:
            with jax.named_scope("vision"):
                vision = self.encode(batch.frames, batch.frame_times)
        with jax.named_scope("llm"):
            x = self.embed(batch.tokens, batch.vision_index, vision)
            return self.llm(x, batch.segment_ids, batch.positions)

    def logits(self, batch: PackedBatch) -> Float32[Array, "B T V"]:
        """All of them at once, so for small batches only."""
        return self.unembed(self.hidden(batch))

    def loss(self, batch: PackedBatch) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
        """(sum of weight * cross-entropy, sum of weights)."""
        hidden = self.hidden(batch)
        return chunked_cross_entropy(hidden, self._head(), batch.targets, batch.weights, chunk=self.llm.loss_chunk)
