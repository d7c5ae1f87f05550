"""Configuration of Kangaroo (arXiv 2408.15542) for transformers: a Llama's keys, and sections for the vision parts."""

from typing import Any

from transformers import PretrainedConfig

VISION = dict(
    patch_size=14,
    width=1024,
    depth=24,
    heads=16,
    mlp_width=2730,
    pos_embed_grid=32,
    rope_theta=10000.0,
    rope_reference_grid=16,
    norm_eps=1e-6,
    output_norm=False,
)
PATCHIFY = dict(enabled=True, kernel=(2, 2, 2), bias=True)
TIME = dict(enabled=True, theta=10000.0)
SPECIAL = dict(vi_start=128002, eof=128003, eov=128004, vi_end=128005, vision=128011)
SAMPLING = dict(
    image_size=448, fps=1.0, min_frames=16, max_frames=64, long_seconds=64.0, long_min_frames=64, long_max_frames=160
)


class KangarooConfig(PretrainedConfig):
    """The keys of a Llama's config.json, and one dictionary each for the other parts."""

    model_type = "kangaroo"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # the cache's names before and since transformers 5.24

    def __init__(
        self,
        vocab_size: int = 128256,
        hidden_size: int = 4096,
        intermediate_size: int = 14336,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int = 8,
        head_dim: int = 128,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 500000.0,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        max_position_embeddings: int = 32768,
        vision_config: dict[str, Any] | None = None,
        patchify_config: dict[str, Any] | None = None,
        time_config: dict[str, Any] | None = None,
        mm_projector_type: str = "mlp2x_gelu",
        special_ids: dict[str, int] | None = None,
        frame_sampling: dict[str, Any] | None = None,
        header_ids: tuple[int, int] = (128006, 128007),
        eot_token_id: int = 128009,
        **kwargs: Any,
    ):
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads, self.head_dim = num_key_value_heads, head_dim
        self.rms_norm_eps, self.max_position_embeddings = rms_norm_eps, max_position_embeddings
        # In transformers 5 the theta is one of the scaling's parameters.
        self.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta, **(rope_scaling or {})}
        self.rope_parameters.update(rope_parameters or {})
        self.vision_config = {**VISION, **(vision_config or {})}
        self.patchify_config = {**PATCHIFY, **(patchify_config or {})}
        self.time_config = {**TIME, **(time_config or {})}
        self.mm_projector_type = mm_projector_type
        self.special_ids = {**SPECIAL, **(special_ids or {})}
        self.frame_sampling = {**SAMPLING, **(frame_sampling or {})}
        self.header_ids, self.eot_token_id = list(header_ids), eot_token_id
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
