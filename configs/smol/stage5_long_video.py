"""Stage 5 with SmolLM2: up to 160 frames of 28 pixels; the encoder is frozen."""

from ml_collections import ConfigDict

from kangaroo_jax.config import lock
from kangaroo_jax.config_files import stage_of_paper


def get_config(preset: str = "smol") -> ConfigDict:
    """The stage's config for a model preset."""
    c = stage_of_paper("stage5_long_video", preset)
    c.data.update(image_size=28, min_frames=8)
    c.data.update(tokens_per_pack=768, frames_per_pack=160, packs_per_batch=2, max_sample_tokens=768, packing_bins=8)
    c.optimizer.learning_rate = 3e-4
    c.optimizer.trainable = (("vision/.*", None), ("llm/.*", 0.25), (".*", 1.0))
    c.train.steps = 500
    c.model.llm.remat, c.optimizer.moment_dtype = "mlp", "bfloat16"  # for memory
    return lock(c)
