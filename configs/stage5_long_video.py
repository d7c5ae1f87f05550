"""Stage 5, long video tuning: ViT frozen, 64 to 160 frames of long videos mixed with short ones (paper section 3)."""

from ml_collections import ConfigDict

from kangaroo_jax.config import lock, stage_config


def get_config(preset: str = "kangaroo_8b") -> ConfigDict:
    """The stage's config for a model preset."""
    c = stage_config(preset)
    c.stage = "stage5_long_video"
    c.data.update(image_size=448, min_frames=16, max_frames=64, long_min_frames=64, long_max_frames=160)
    c.data.update(max_sample_tokens=22_528, tokens_per_pack=26_624, frames_per_pack=204, packs_per_batch=64)
    c.data.packing_bins = 32  # a row holds two samples: more to choose from
    c.optimizer.learning_rate = 1e-5
    c.optimizer.trainable = (("vision/.*", None), (".*", 1.0))
    c.train.steps = 5_100  # 700K conversations, 2.1 a row
    return lock(c)
