"""Stage 2 of the tiny world: videos of 16 pixels; everything trains."""

from ml_collections import ConfigDict

from kangaroo_jax.config import lock
from kangaroo_jax.config_files import stage_of_paper


def get_config(preset: str = "tiny") -> ConfigDict:
    """The stage's config for a model preset."""
    c = stage_of_paper("stage2_video_pretrain", preset)
    c.data.loss_on = "assistant"  # the request says in which language to answer
    c.data.update(image_size=16, tokens_per_pack=512, frames_per_pack=36, packs_per_batch=4)
    c.optimizer.learning_rate = 2e-3
    c.optimizer.trainable = ((".*", 1.0),)  # as in stage 1
    c.train.steps = 540
    return lock(c)
