"""Beyond the paper: stage 5 on whole hours, 3,600 frames of one video as one sample, its tokens cut over devices."""

from ml_collections import ConfigDict

from kangaroo_jax.config import lock, stage_config


def get_config(preset: str = "kangaroo_8b") -> ConfigDict:
    """The stage's config for a model preset."""
    c = stage_config(preset)
    c.stage = "hour_video"
    c.data.update(image_size=448, min_frames=64, max_frames=160, long_min_frames=160, long_max_frames=3600)
    # 1,800 groups of 256 tokens and a mark each, and 4,341 places for text; a multiple of 128 on 32 half pieces.
    c.data.update(max_sample_tokens=466_944, tokens_per_pack=466_944)
    c.data.update(packs_per_batch=4, frames_per_pack=3712)  # whole groups on each of 128, 64, 32 .. devices
    c.optimizer.learning_rate = 1e-5
    c.optimizer.trainable = (("vision/.*", None), (".*", 1.0))
    c.train.steps = 2_000
    return lock(c)
