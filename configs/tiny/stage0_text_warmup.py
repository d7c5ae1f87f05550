"""Text warm-up of the tiny decoder before its five stages: stands in for Llama-3's pretraining, no part of Kangaroo."""

from ml_collections import ConfigDict

from kangaroo_jax.config import lock, stage_config


def get_config(preset: str = "tiny") -> ConfigDict:
    """The stage's config for a model preset."""
    c = stage_config(preset)
    c.stage = "stage0_text_warmup"
    c.model.patchify.enabled = False
    c.data.update(image_size=16, min_frames=1, max_frames=1, long_min_frames=1, long_max_frames=1)
    c.data.update(shuffle=False, packing_bins=1)  # the simple comes first, and little of it waits
    c.data.update(tokens_per_pack=256, frames_per_pack=0, packs_per_batch=8, max_sample_tokens=256)
    c.optimizer.learning_rate = 3e-3
    c.optimizer.final_fraction = 0.5
    c.optimizer.trainable = (("llm/.*", 1.0), (".*", None))
    c.train.steps = 2150
    return lock(c)
