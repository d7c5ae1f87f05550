"""Stage 2, video pre-training: ViT and projector on 8 frames at 224 pixels (paper section 3)."""

from ml_collections import ConfigDict

from kangaroo_jax.config import lock, stage_config


def get_config(preset: str = "kangaroo_8b") -> ConfigDict:
    """The stage's config for a model preset."""
    c = stage_config(preset)
    c.stage = "stage2_video_pretrain"
    c.model.patchify.enabled = False
    c.data.update(image_size=224, min_frames=8, max_frames=8, long_min_frames=8, long_max_frames=8)
    c.data.update(loss_on="caption", max_sample_tokens=2560)
    c.data.update(tokens_per_pack=10_240, frames_per_pack=32, packs_per_batch=256)  # about 1024 videos
    c.optimizer.learning_rate = 1e-4
    c.optimizer.trainable = (("projector/.*|special_embedding", 1.0), ("vision/.*", 0.2), (".*", None))
    c.train.steps = 58_600  # 60M videos
    return lock(c)
