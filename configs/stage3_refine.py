"""Stage 3, pre-training refinement: ViT, projector and patchify on 16 frames at 448 pixels (paper section 3)."""

from ml_collections import ConfigDict

from kangaroo_jax.config import lock, stage_config


def get_config(preset: str = "kangaroo_8b") -> ConfigDict:
    """The stage's config for a model preset."""
    c = stage_config(preset)
    c.stage = "stage3_refine"
    c.data.update(image_size=448, min_frames=16, max_frames=16, long_min_frames=16, long_max_frames=16)
    c.data.update(loss_on="caption", max_sample_tokens=2560)
    c.data.update(tokens_per_pack=10_240, frames_per_pack=64, packs_per_batch=128)  # about 512 videos
    c.optimizer.learning_rate = 2e-5
    c.optimizer.trainable = (("(vision|projector|patchify)/.*|special_embedding", 1.0), (".*", None))
    c.train.steps = 13_500  # 6.9M videos
    return lock(c)
