"""Hours in the tiny world: 320 frames at 48 pixels."""

from ml_collections import ConfigDict

from kangaroo_jax.config import lock
from kangaroo_jax.config_files import stage_of_paper


def get_config(preset: str = "tiny") -> ConfigDict:
    """The stage's config for a model preset."""
    c = stage_of_paper("hour_video", preset)
    c.data.update(image_size=48, tokens_per_pack=2048, frames_per_pack=320, packs_per_batch=1)
    c.data.update(max_sample_tokens=2048, long_max_frames=320)
    c.optimizer.learning_rate = 1e-3
    c.train.steps = 400
    return lock(c)
