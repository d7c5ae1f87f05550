"""Stage 4 of the tiny world: 8 to 64 frames of 32 pixels; everything trains."""

from ml_collections import ConfigDict

from kangaroo_jax.config import lock
from kangaroo_jax.config_files import stage_of_paper


def get_config(preset: str = "tiny") -> ConfigDict:
    """The stage's config for a model preset."""
    c = stage_of_paper("stage4_instruct", preset)
    c.data.update(image_size=32, min_frames=8, long_min_frames=8)
    c.data.update(tokens_per_pack=512, frames_per_pack=56, packs_per_batch=4)
    c.optimizer.learning_rate = 2e-3
    c.optimizer.trainable = ((".*", 1.0),)
    c.train.steps = 400
    return lock(c)
