"""Stage 4, instruction tuning: everything trains, 16 to 64 frames at 448 pixels (paper section 3)."""

from ml_collections import ConfigDict

from kangaroo_jax.config import lock, stage_config


def get_config(preset: str = "kangaroo_8b") -> ConfigDict:
    """The stage's config for a model preset."""
    c = stage_config(preset)
    c.stage = "stage4_instruct"
    c.data.update(image_size=448, min_frames=16, max_frames=64, long_min_frames=16, long_max_frames=64)
    # Longer than the longest sample: beside one of 50 frames there must be room for another (docs/data.md).
    c.data.update(max_sample_tokens=10_240, tokens_per_pack=13_312, frames_per_pack=96, packs_per_batch=128)
    c.optimizer.learning_rate = 1e-5
    c.optimizer.trainable = (("vision/.*", 0.2), (".*", 1.0))
    c.train.steps = 7_600  # 2.24M conversations, 2.3 a row
    return lock(c)
