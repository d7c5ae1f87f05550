"""Stage 5 of the tiny world: up to 160 frames of 32 pixels."""

from ml_collections import ConfigDict

from kangaroo_jax.config import lock
from kangaroo_jax.config_files import stage_of_paper


def get_config(preset: str = "tiny") -> ConfigDict:
    """The stage's config for a model preset."""
    c = stage_of_paper("stage5_long_video", preset)
    c.data.packing_bins = 8
    c.data.update(image_size=32, min_frames=8)
    c.data.update(tokens_per_pack=768, frames_per_pack=160, packs_per_batch=3)
    c.optimizer.learning_rate = 2e-3
    c.train.steps = 330
    return lock(c)
