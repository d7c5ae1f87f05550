"""FLOPs of a train step by formula, part by part.

A multiplication and an addition are two FLOPs. The forward pass, the gradient of the activations and the gradient of
the weights cost the same. A frozen part has no gradient of its weights, and none of its activations if nothing below
it trains. Recomputation by remat does not count.
"""

import dataclasses
import re

from kangaroo_jax.config import StageConfig, frames_per_group, tokens_per_group
from kangaroo_jax.models.parameters import multiplier

_SOME_WEIGHT = {
    "vision": "blocks/attention/query/kernel",
    "patchify": "kernel",
    "projector": "first/kernel",
    "llm": "layers/attention/query/kernel",
}
PARTS = (*_SOME_WEIGHT, "special_embedding")


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one step over the whole batch."""

    vision: float  # encoder, with full attention
    projector: float
    llm_linear: float
    llm_attention_full: float  # every token attends to every token of its pack
    llm_attention_causal: float  # half of that
    head: float
    score_recomputation: float  # scores that FlashAttention's backward computes again, by formula

    @property
    def full(self) -> float:
        """A step's FLOPs with full decoder attention (PaLM's convention)."""
        return self.vision + self.projector + self.llm_linear + self.llm_attention_full + self.head

    @property
    def causal(self) -> float:
        """A step's FLOPs with causal decoder attention."""
        return self.full - self.llm_attention_full + self.llm_attention_causal

    @property
    def vision_share(self) -> float:
        """The encoder's share of `causal`."""
        return self.vision / self.causal


def step_flops(config: StageConfig, head_tokens: int | None = None) -> Flops:
    """FLOPs of a train step for a stage's config.

    `head_tokens`: targets of positive weight in the batch, for which logits are computed; by default all.
    """
    model, data = config.model, config.data
    tokens, frames = data.packs_per_batch * data.tokens_per_pack, data.packs_per_batch * data.frames_per_pack
    vision, llm = model.vision, model.llm
    trains = {name: part_trains(name, config) for name in PARTS}
    adapted = {name: part_adapted(name, config) for name in PARTS}
    learns = {name: trains[name] or adapted[name] for name in PARTS}  # its activations have a gradient
    below_llm = frames > 0 and any(learns[name] for name in ("vision", "patchify", "projector", "special_embedding"))

    patches = (data.image_size // vision.patch_size) ** 2
    vision_tokens, d = patches + 1, vision.width
    layer = 4 * d * d + 3 * d * vision.mlp_width
    linear = 2.0 * (vision.depth * layer * vision_tokens + vision.patch_size**2 * 3 * d * patches)
    attention = 4.0 * vision.depth * vision_tokens * vision_tokens * d
    times = 3 if trains["vision"] else 1 + adapted["vision"]

    groups = frames // frames_per_group(model)
    rows = groups * tokens_per_group(model, data.image_size)
    widths = d * llm.width + (llm.width**2 if model.projector == "mlp2x_gelu" else 0)
    projector_times = 1 + trains["projector"] + (learns["vision"] or trains["patchify"] or adapted["projector"])

    n, k, h = llm.heads, llm.kv_heads, llm.head_dim
    llm_layer = llm.width * h * (2 * n + 2 * k) + 3 * llm.width * llm.mlp_width
    llm_times = 1 + trains["llm"] + (learns["llm"] or below_llm)
    backward = llm_times > 1
    llm_full = 4.0 * llm.depth * tokens * data.tokens_per_pack * n * h * (3 if backward else 1)
    head_tokens = tokens if head_tokens is None else head_tokens
    return Flops(
        vision=frames * (linear + attention) * times,
        projector=2.0 * rows * widths * projector_times,
        llm_linear=2.0 * llm.depth * llm_layer * tokens * llm_times,
        llm_attention_full=llm_full,
        llm_attention_causal=llm_full / 2,
        head=2.0 * llm.width * llm.vocab_size * head_tokens * llm_times,
        score_recomputation=(llm_full / 12 if backward else 0.0) + (frames * attention / 2 if times == 3 else 0.0),
    )


def part_trains(part: str, config: StageConfig) -> bool:
    """Whether the matrices of a part of the model train, by `config.optimizer.trainable`."""
    path = part if part == "special_embedding" else f"{part}/{_SOME_WEIGHT[part]}"
    return not config.lora.rank and multiplier(path, config.optimizer.trainable) is not None


def part_adapted(part: str, config: StageConfig) -> bool:
    """Whether linear maps of a part of the model have factors, by `config.lora.targets`; these cost nothing here."""
    path = f"{part}/{_SOME_WEIGHT.get(part, '')}".removesuffix("/kernel")
    return config.lora.rank > 0 and re.fullmatch(config.lora.targets, path) is not None
