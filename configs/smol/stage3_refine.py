"""Stage 3 with SmolLM2: 8 to 16 frames of 28 pixels; the encoder, the patchify and the projector train."""

from ml_collections import ConfigDict

from kangaroo_jax.config import lock
from kangaroo_jax.config_files import stage_of_paper


def get_config(preset: str = "smol") -> ConfigDict:
    """The stage's config for a model preset."""
    c = stage_of_paper("stage3_refine", preset)
    c.data.loss_on = "assistant"  # as in stage 1
    c.data.update(image_size=28, min_frames=8, long_min_frames=8)
    c.data.update(tokens_per_pack=512, frames_per_pack=48, packs_per_batch=2, max_sample_tokens=512)
    c.optimizer.learning_rate = 2e-4  # at 6e-4 it forgets which letter an option has
    c.optimizer.trainable = (("(projector|vision|patchify)/.*|special_embedding", 1.0), (".*", None))
    c.train.steps = 400
    c.model.scan = False  # in bfloat16 XLA turns all that a loop keeps to float32 and back, each time round, on a CPU
    return lock(c)
