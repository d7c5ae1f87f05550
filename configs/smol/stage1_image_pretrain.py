"""Stage 1 with SmolLM2: images of 28 pixels; the encoder and the projector train."""

from ml_collections import ConfigDict

from kangaroo_jax.config import lock
from kangaroo_jax.config_files import stage_of_paper


def get_config(preset: str = "smol") -> ConfigDict:
    """The stage's config for a model preset."""
    c = stage_of_paper("stage1_image_pretrain", preset)
    c.data.loss_on = "assistant"  # the request says what is asked for, and in which language
    c.data.update(image_size=28, tokens_per_pack=256, frames_per_pack=8, packs_per_batch=4, max_sample_tokens=256)
    c.optimizer.learning_rate = 6e-4
    c.optimizer.trainable = (("projector/.*|special_embedding", 1.0), ("vision/.*", 0.5), (".*", None))
    c.train.steps = 350
    c.model.scan = False  # in bfloat16 XLA turns all that a loop keeps to float32 and back, each time round, on a CPU
    return lock(c)
