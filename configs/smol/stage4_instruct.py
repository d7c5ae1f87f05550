"""Stage 4 with SmolLM2: 8 to 64 frames of 28 pixels; everything trains."""

from ml_collections import ConfigDict

from kangaroo_jax.config import lock
from kangaroo_jax.config_files import stage_of_paper


def get_config(preset: str = "smol") -> ConfigDict:
    """The stage's config for a model preset."""
    c = stage_of_paper("stage4_instruct", preset)
    c.data.update(image_size=28, min_frames=8, long_min_frames=8)
    c.data.update(tokens_per_pack=512, frames_per_pack=48, packs_per_batch=2, max_sample_tokens=512)
    c.optimizer.learning_rate = 3e-4
    c.optimizer.trainable = (("llm/.*", 0.25), (".*", 1.0))  # a decoder at 6e-4 becomes blind
    c.train.steps = 900
    c.model.llm.remat, c.optimizer.moment_dtype = "mlp", "bfloat16"  # for memory
    return lock(c)
