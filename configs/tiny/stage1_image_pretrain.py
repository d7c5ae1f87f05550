"""Stage 1 of the tiny world: images of 16 pixels, captions first and then questions; everything trains."""

from ml_collections import ConfigDict

from kangaroo_jax.config import lock
from kangaroo_jax.config_files import stage_of_paper


def get_config(preset: str = "tiny") -> ConfigDict:
    """The stage's config for a model preset."""
    c = stage_of_paper("stage1_image_pretrain", preset)
    c.data.loss_on = "assistant"  # the request says in which language to answer
    c.data.update(image_size=16, tokens_per_pack=256, frames_per_pack=8, packs_per_batch=8)
    c.data.update(shuffle=False, packing_bins=1)  # captions first, then questions among them
    c.optimizer.learning_rate = 2e-3
    c.optimizer.trainable = ((".*", 1.0),)  # the tiny decoder has no pretraining to protect
    c.train.steps = 400  # as far as its records reach: captions again at the end would undo the letters
    return lock(c)
