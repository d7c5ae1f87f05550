"""Stage 1, image pre-training: ViT and projector on image captions at 224 pixels (paper section 3)."""

from ml_collections import ConfigDict

from kangaroo_jax.config import lock, stage_config


def get_config(preset: str = "kangaroo_8b") -> ConfigDict:
    """The stage's config for a model preset."""
    c = stage_config(preset)
    c.stage = "stage1_image_pretrain"
    c.model.patchify.enabled = False
    c.data.update(image_size=224, min_frames=1, max_frames=1, long_min_frames=1, long_max_frames=1)
    c.data.update(loss_on="caption", max_sample_tokens=512)
    c.data.update(tokens_per_pack=8192, frames_per_pack=16, packs_per_batch=128)  # about 2048 images
    c.optimizer.learning_rate = 1e-3
    c.optimizer.trainable = (("projector/.*|special_embedding", 1.0), ("vision/.*", 0.1), (".*", None))
    c.train.steps = 146_000  # 300M images
    return lock(c)
