"""The configuration: every key once, with its default, its unit and where it comes from.

A stage file in `configs/` takes `stage_config(preset)` and changes what the stage changes. Facts that
nobody outside the authors of Kangaroo knows ("inferred") are keys here, never constants in code.
"""

from typing import Any

import ml_collections
from ml_collections import ConfigDict

PRESETS = ("kangaroo_8b", "base_100m", "tiny")
# The curriculum, in order: files of `configs/`.
STAGES = (
    "stage1_image_pretrain",
    "stage2_video_pretrain",
    "stage3_refine",
    "stage4_instruct",
    "stage5_long_video",
)


def model_config(preset: str) -> ConfigDict:
    """The model of a preset: `kangaroo_8b` (published sizes), `base_100m` (benchmarks) or `tiny` (CPU).

    Raises ValueError for an unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: one of {', '.join(PRESETS)}")
    c = ConfigDict()
    c.preset = preset
    c.dtype = "bfloat16"  # of the computation; weights that train are float32
    c.scan = True  # layers stacked and scanned; False unrolls them, for debugging
    c.attention = "auto"  # splash, cudnn, xla_chunked or auto

    v = c.vision = ConfigDict()
    v.patch_size = 14
    v.width = 1024
    v.depth = 24
    v.heads = 16
    v.mlp_width = 2730
    v.pos_embed_grid = 32  # side of the stored position embedding; other grids are resized from it
    v.rope_theta = 10_000.0
    v.rope_reference_grid = 16  # rotary positions run from 0 to this, whatever the grid
    v.norm_eps = 1e-6
    v.output_norm = False  # inferred: the features before the final norm
    v.remat = "auto"  # none, dots, minimal, full, offload (models/stack.py); auto is by stage and chip

    t = c.tpe = ConfigDict()
    t.enabled = True
    t.theta = 10_000.0  # inferred

    p = c.patchify = ConfigDict()
    p.enabled = True  # stages 1 and 2 bypass it
    p.kernel = (2, 2, 2)  # inferred: frames, rows, columns; the stride is the same
    p.bias = True  # inferred

    c.projector = "mlp2x_gelu"  # inferred: linear or mlp2x_gelu

    m = c.llm = ConfigDict()
    m.vocab_size = 128_256
    m.width = 4096
    m.depth = 32
    m.heads = 32
    m.kv_heads = 8
    m.head_dim = 128
    m.mlp_width = 14_336
    m.rope_theta = 500_000.0
    # Of Llama 3.1 and later (factor 8); Llama 3 and Kangaroo have none (factor 1).
    m.rope_scaling = ConfigDict(dict(factor=1.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192))
    m.norm_eps = 1e-5
    m.remat = "auto"
    m.loss_chunk = 1024  # tokens whose logits exist at a time
    # Inferred: the four marks around a video are renamed reserved tokens; the last is only a placeholder.
    c.special_ids = ConfigDict(dict(vi_start=128_002, eof=128_003, eov=128_004, vi_end=128_005, vision=128_011))

    if preset == "base_100m":
        v.update(width=512, depth=8, heads=8, mlp_width=1365, pos_embed_grid=16, remat="none")
        m.update(vocab_size=32_000, width=768, depth=8, heads=12, kv_heads=4, head_dim=64, mlp_width=2048)
        m.update(remat="none", loss_chunk=512)
        c.special_ids.update(vi_start=6, eof=7, eov=8, vi_end=9, vision=10)
    if preset == "tiny":
        c.update(dtype="float32", scan=False)
        v.update(patch_size=8, width=96, depth=4, heads=3, mlp_width=256, remat="none")
        # Features of unit size, beside which the time encoding can be seen; those of a pretrained encoder can be
        # larger, because the decoder has seen more.
        v.update(pos_embed_grid=4, rope_reference_grid=4, output_norm=True)
        m.update(vocab_size=768, width=64, depth=4, heads=4, kv_heads=4, head_dim=16, mlp_width=192)
        m.update(rope_theta=10_000.0, remat="none", loss_chunk=128)
        c.special_ids.update(vi_start=6, eof=7, eov=8, vi_end=9, vision=10)
    return c


def stage_config(preset: str) -> ConfigDict:
    """Defaults of a training stage, to be changed by its file in `configs/`."""
    c = ConfigDict()
    c.stage = ""  # name of the stage; a folder of the curriculum's workdir
    c.model = model_config(preset)
    c.init_from = ""  # checkpoint folder whose weights the stage starts from; "" is a fresh start
    c.init_other_rope = False  # True: the stage may change the rope settings of init_from, as for longer contexts
    c.allow_changes = ()  # keys ("model.llm.rope_theta", "data.tokenizer") that may differ from the checkpoint's
    c.seed = 0

    d = c.data = ConfigDict()
    d.train = ()  # annotation files of any format (docs/data.md), or names of the registry; NAME%50 takes half
    d.weights = ()  # one a source: how often it is drawn; () draws by size
    d.registry = ""  # JSON file of named sources (Qwen's or LLaMA-Factory's dataset_info.json)
    d.media_root = ""  # folder of the media they name; "" is each file's own folder
    d.tokenizer = ""  # tokenizer.json, tokenizer.model (Llama 3) or a SentencePiece .model
    d.shuffle = True  # False takes the samples in the order of the files, one after the other, again and again
    d.loss_on = "assistant"  # assistant: its turns alone; caption: the same with no user text in the prompt
    d.image_size = 448  # S, pixels
    d.fps = 1.0  # frames sampled a second, clipped to the ranges below
    d.min_frames = 16
    d.max_frames = 64
    d.long_seconds = 64.0  # a video longer than this takes the long range
    d.long_min_frames = 16
    d.long_max_frames = 64
    d.max_sample_tokens = 10_240  # a longer sample is cut at a turn, or goes to the ledger
    d.tokens_per_pack = 10_240  # T
    d.frames_per_pack = 64  # F
    d.packs_per_batch = 128  # B, over all hosts
    d.packing_bins = 16  # packs' worth of samples among which a row is filled; 0: one sample a row
    d.num_workers = 0  # decoding processes; 0 decodes in threads of this process
    d.decode_seconds = 120.0  # for one file; then it is given up, and its process replaced
    d.media_cache = ""  # folder of media fetched from gs://, s3://, https://; "" is ~/.cache/kangaroo/media
    d.media_cache_gib = 50
    d.fetch_gib = 4.0  # of one address; a larger one goes to the ledger
    d.fetch_seconds = 600.0  # for one address
    d.allow_private = False  # True: addresses may lead to this machine and to private networks
    d.cache_mib = 0  # decoded clips kept in memory, for corpora small enough to be read again and again
    d.strict = False  # True raises at the first sample that cannot be read

    o = c.optimizer = ConfigDict()
    o.learning_rate = 1e-4  # at the peak, where the multiplier is 1
    # What trains, and at what rate: the first pattern that matches a parameter's path gives its
    # multiplier of the learning rate; None freezes it.
    o.trainable = ((".*", 1.0),)
    o.warmup_fraction = 0.03  # inferred, as are the rest
    o.final_fraction = 0.1  # cosine decay to this share of the peak
    o.kind = "adamw"  # adafactor, whose state is a thousandth of the weights; muon, which learns more in a step
    o.moment_dtype = "float32"  # of Adam's two moments: float32 or bfloat16
    o.b1 = 0.9
    o.b2 = 0.95
    o.eps = 1e-8
    o.weight_decay = 0.1  # none on biases, norms and embeddings of position
    o.clip_norm = 1.0  # of the gradient; 0 does not clip
    o.frozen_dtype = "bfloat16"
    if preset == "tiny":
        o.kind = "muon"  # learns from scratch what the other presets have from pretraining

    t = c.train = ConfigDict()
    t.steps = 1000
    t.log_every = 10
    t.checkpoint_every = 500  # steps; the last step is always saved
    t.checkpoint_minutes = 20.0  # and whenever the last save is so long ago; 0: by steps alone
    t.keep_checkpoints = 2  # the last ones; 0 keeps all
    t.keep_period = 0  # steps; a checkpoint of a multiple of it is saved and never deleted; 0: none
    t.on_nonfinite = "stop"  # a loss or gradient that is not finite: stop, or skip what the step would change
    t.nonfinite_in_a_row = 10  # so many skipped steps one after another stop the stage, too
    t.tensorboard = False
    t.profile = ()  # (first, last) step to profile into workdir/profile
    t.compile_cache = ""  # folder that keeps compiled programs between runs; "" is JAX's own default
    t.lost_seconds = 30.0  # a host that is silent for so long is lost: the others stop, with exit code 75
    t.mesh = ()  # data, fsdp, context, tensor; -1 takes what is left, () is by stage and chip
    t.accumulate = 0  # parts of a batch computed one after another; 0 is by stage and chip

    if preset == "tiny":
        d.update(image_size=48, max_sample_tokens=1024, packing_bins=8)
        d.update(tokens_per_pack=512, frames_per_pack=48, packs_per_batch=4, cache_mib=512)
        t.update(log_every=10, checkpoint_every=100, mesh=(1, -1, 1, 1), accumulate=1)
    return c


def lock(config: ConfigDict) -> ConfigDict:
    """Lock a finished config: an unknown key is then an error that names the nearest known one."""
    return config.lock()


def to_plain(config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict) -> dict:
    """A config as plain dictionaries and lists, for JSON."""
    return config.to_dict()


def frames_per_group(config: Any) -> int:
    """How many frames stand behind one group of vision tokens: what the patchify joins, 1 where it is bypassed."""
    return config.patchify.kernel[0] if config.patchify.enabled else 1


def tokens_per_group(config: Any, image_size: int) -> int:
    """Vision tokens of one temporal group of frames of `image_size` pixels."""
    grid = image_size // config.vision.patch_size
    _, rows, columns = config.patchify.kernel if config.patchify.enabled else (1, 1, 1)
    return (grid // rows) * (grid // columns)
