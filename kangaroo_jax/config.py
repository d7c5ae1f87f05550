"""The configuration: every key once, with its default, its unit and where it comes from.

A dataclass is a section, its field a key. A stage file in `configs/` takes `stage_config(preset)`, a ConfigDict made
of them, and changes what the stage changes; `from_config` makes a section of such a ConfigDict again, whose keys a
type checker sees. Facts that nobody outside the authors of Kangaroo knows ("inferred") are keys here, never constants
in code.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from kangaroo_jax.config_files import Section as Section
from kangaroo_jax.config_files import load_config
from kangaroo_jax.config_files import tuples as tuples

# The curriculum, in order: files of `configs/`.
STAGES = (
    "stage1_image_pretrain",
    "stage2_video_pretrain",
    "stage3_refine",
    "stage4_instruct",
    "stage5_long_video",
)


# ---------------------------------------------------------------------------------- the model


@dataclasses.dataclass(frozen=True)
class VisionConfig(Section):
    """The ViT."""

    PATH = "config.model.vision"

    patch_size: int = 14
    width: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_width: int = 2730
    pos_embed_grid: int = 32  # side of the stored position embedding; other grids are resized from it
    rope_theta: float = 10_000.0
    rope_reference_grid: int = 16  # rotary positions run from 0 to this, whatever the grid
    norm_eps: float = 1e-6
    output_norm: bool = False  # inferred: the features before the final norm
    remat: str = (
        "auto"  # none, dots, mlp, gate, minimal, context, full, offload (models/stack.py); auto is by stage and chip
    )


@dataclasses.dataclass(frozen=True)
class TimeConfig(Section):
    """The temporal position encoding."""

    PATH = "config.model.tpe"

    enabled: bool = True
    theta: float = 10_000.0  # inferred


@dataclasses.dataclass(frozen=True)
class PatchifyConfig(Section):
    """The 3D patchify."""

    PATH = "config.model.patchify"

    enabled: bool = True  # stages 1 and 2 bypass it
    kernel: tuple[int, ...] = (2, 2, 2)  # inferred: frames, rows, columns; the stride is the same
    bias: bool = True  # inferred


@dataclasses.dataclass(frozen=True)
class RopeScaling(Section):
    """Of Llama 3.1 and later (factor 8); Llama 3 and Kangaroo have none (factor 1)."""

    PATH = "config.model.llm.rope_scaling"

    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192  # tokens


@dataclasses.dataclass(frozen=True)
class LlamaConfig(Section):
    """The decoder."""

    PATH = "config.model.llm"

    vocab_size: int = 128_256
    added_rows: int = 0  # the last of these, which the decoder did not bring: marks around a video, and padding
    width: int = 4096
    depth: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    mlp_width: int = 14_336
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling = RopeScaling()
    norm_eps: float = 1e-5
    tied_head: bool = False  # True: the token embedding is the head, too
    remat: str = "auto"
    loss_chunk: int = 1024  # tokens whose logits exist at a time


@dataclasses.dataclass(frozen=True)
class SpecialIds(Section):
    """Inferred: the four marks around a video are renamed reserved tokens; the last is only a placeholder."""

    PATH = "config.model.special_ids"

    vi_start: int = 128_002
    eof: int = 128_003
    eov: int = 128_004
    vi_end: int = 128_005
    vision: int = 128_011


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """The model; the defaults are those of the published sizes."""

    PATH = "config.model"

    preset: str = "kangaroo_8b"
    dtype: str = "bfloat16"  # of the computation; weights that train are float32
    scan: bool = True  # layers stacked and scanned; False unrolls them, for debugging
    attention: str = "auto"  # splash, triton, tokamax, xla_chunked or auto
    vision: VisionConfig = VisionConfig()
    tpe: TimeConfig = TimeConfig()
    patchify: PatchifyConfig = PatchifyConfig()
    projector: str = "mlp2x_gelu"  # inferred: linear or mlp2x_gelu
    llm: LlamaConfig = LlamaConfig()
    special_ids: SpecialIds = SpecialIds()


_SMALL_IDS = SpecialIds(vi_start=6, eof=7, eov=8, vi_end=9, vision=10)
_BASE = ModelConfig(
    preset="base_100m",
    vision=VisionConfig(width=512, depth=8, heads=8, mlp_width=1365, pos_embed_grid=16, remat="none"),
    llm=LlamaConfig(
        vocab_size=32_000,
        width=768,
        depth=8,
        heads=12,
        kv_heads=4,
        head_dim=64,
        mlp_width=2048,
        remat="none",
        loss_chunk=512,
    ),
    special_ids=_SMALL_IDS,
)
_TINY = ModelConfig(
    preset="tiny",
    dtype="float32",
    scan=False,
    vision=VisionConfig(
        patch_size=8,
        width=96,
        depth=4,
        heads=3,
        mlp_width=256,
        remat="none",
        pos_embed_grid=4,
        rope_reference_grid=4,
        # Features of unit size, beside which the time encoding can be seen; those of a pretrained encoder can be
        # larger, because the decoder has seen more.
        output_norm=True,
    ),
    llm=LlamaConfig(
        vocab_size=768,
        width=64,
        depth=4,
        heads=4,
        kv_heads=4,
        head_dim=16,
        mlp_width=192,
        rope_theta=10_000.0,
        remat="none",
        loss_chunk=128,
    ),
    special_ids=_SMALL_IDS,
)


# Llama 3.2's rope, and its tokenizer's ids, which are Llama 3's; the encoder is that of the published sizes.
_LLAMA_32 = RopeScaling(factor=32.0)
_1B = ModelConfig(
    preset="kangaroo_1b",
    llm=LlamaConfig(width=2048, depth=16, head_dim=64, mlp_width=8192, rope_scaling=_LLAMA_32, tied_head=True),
)
_3B = ModelConfig(
    preset="kangaroo_3b",
    llm=LlamaConfig(
        width=3072, depth=28, heads=24, head_dim=128, mlp_width=8192, rope_scaling=_LLAMA_32, tied_head=True
    ),
)
_SMOL = ModelConfig(
    preset="kangaroo_smol",
    # EVA-02's design at the sizes of its small one, 22 million weights, for 224 pixels.
    vision=VisionConfig(width=384, depth=12, heads=6, mlp_width=1024, pos_embed_grid=16, output_norm=True),
    llm=LlamaConfig(  # SmolLM2-135M (Allal et al. 2025), with 128 rows for the marks
        vocab_size=49_280,
        added_rows=128,
        width=576,
        depth=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        mlp_width=1536,
        rope_theta=100_000.0,
        tied_head=True,
    ),
    special_ids=SpecialIds(vi_start=49_152, eof=49_153, eov=49_154, vi_end=49_155, vision=49_156),
)
# The same for the quickstart's media: pictures of 28 and 56 pixels, computed in float32 on a CPU.
_SMALL_SMOL = dataclasses.replace(
    _SMOL,
    preset="smol",
    dtype="float32",
    vision=dataclasses.replace(_SMOL.vision, pos_embed_grid=4, rope_reference_grid=4, remat="none"),
    llm=dataclasses.replace(_SMOL.llm, remat="none", loss_chunk=64),
)


# ----------------------------------------------------------------------------------- a stage


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """What a stage reads, and how it is packed."""

    PATH = "config.data"

    train: tuple[str, ...] = ()  # annotation files of any format (docs/data.md), or registry names; NAME%50 takes half
    weights: tuple[float, ...] = ()  # one a source: how often it is drawn; () draws by size
    registry: str = ""  # JSON file of named sources (Qwen's or LLaMA-Factory's dataset_info.json)
    media_root: str = ""  # folder of the media they name; "" is each file's own folder
    tokenizer: str = ""  # tokenizer.json, tokenizer.model (Llama 3) or a SentencePiece .model
    shuffle: bool = True  # False takes the samples in the order of the files, one after the other, again and again
    loss_on: str = "assistant"  # assistant: its turns alone; caption: the same with no user text in the prompt
    image_size: int = 448  # S, pixels
    fps: float = 1.0  # frames sampled a second, clipped to the ranges below
    min_frames: int = 16
    max_frames: int = 64
    long_seconds: float = 64.0  # a video longer than this takes the long range
    long_min_frames: int = 16
    long_max_frames: int = 64
    max_sample_tokens: int = 10_240  # a longer sample is cut at a turn, or goes to the ledger
    tokens_per_pack: int = 10_240  # T
    frames_per_pack: int = 64  # F
    packs_per_batch: int = 128  # B, over all hosts
    packing_bins: int = 16  # packs' worth of samples among which a row is filled; 0: one sample a row
    num_workers: int = 0  # decoding processes; 0 decodes in threads of this process
    decode_seconds: float = 120.0  # for one file; then it is given up, and its process replaced
    media_cache: str = ""  # folder of media fetched from gs://, s3://, https://; "" is ~/.cache/kangaroo/media
    media_cache_gib: int = 50
    fetch_gib: float = 4.0  # of one address; a larger one goes to the ledger
    fetch_seconds: float = 600.0  # for one address
    allow_private: bool = False  # True: addresses may lead to this machine and to private networks
    cache_mib: int = 0  # decoded clips kept in memory, for corpora small enough to be read again and again
    strict: bool = False  # True raises at the first sample that cannot be read


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Section):
    """What trains, and how."""

    PATH = "config.optimizer"

    learning_rate: float = 1e-4  # at the peak, where the multiplier is 1
    # What trains, and at what rate: the first pattern that matches a parameter's path gives its
    # multiplier of the learning rate; None freezes it.
    trainable: tuple[tuple[str, float | None], ...] = ((".*", 1.0),)
    warmup_fraction: float = 0.03  # inferred, as are the rest
    final_fraction: float = 0.1  # cosine decay to this share of the peak
    kind: str = "adamw"  # adafactor, whose state is a thousandth of the weights; muon, which learns more in a step
    moment_dtype: str = "float32"  # of Adam's two moments: float32 or bfloat16
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # none on biases, norms and embeddings of position
    clip_norm: float = 1.0  # of the gradient; 0 does not clip
    frozen_dtype: str = "bfloat16"
    spike_factor: float = 0.0  # a gradient's norm of so many medians of the last ones passes the step over; 0: never
    spike_window: int = 100  # steps whose norms the median is of
    ema: float = 0.0  # decay of an average of the weights, kept beside them; 0: none


@dataclasses.dataclass(frozen=True)
class LoraConfig(Section):
    """Factors beside linear maps, which train in place of the weights of `init_from` (docs/training.md)."""

    PATH = "config.lora"

    rank: int = 0  # 0: none, the weights themselves train
    alpha: float = 32.0  # the factors' product is multiplied by alpha / rank
    rslora: bool = False  # by alpha / sqrt(rank) in its place
    targets: str = "(llm/layers|projector)/.*"  # which linear maps in layers, blocks and the projector, by their paths
    quantize: str = ""  # int8 or int4: how the decoder's frozen weights are held; "": as they are
    keep_state: bool = True  # False: a finished run keeps the best checkpoint's factors alone, and cannot go on

    @property
    def scale(self) -> float:
        """What the factors' product is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class TrainConfig(Section):
    """Steps, checkpoints, and where the arrays lie."""

    PATH = "config.train"

    steps: int = 1000
    epochs: float = 0.0  # passes over all samples, which then say how many steps there are; 0: `steps` says it
    log_every: int = 10
    checkpoint_every: int = 500  # steps; the last step is always saved
    checkpoint_minutes: float = 20.0  # and whenever the last save is so long ago; 0: by steps alone
    keep_checkpoints: int = 2  # the last ones; 0 keeps all
    keep_period: int = 0  # steps; a checkpoint of a multiple of it is saved and never deleted; 0: none
    on_nonfinite: str = "stop"  # a loss or gradient that is not finite: stop, or skip what the step would change
    nonfinite_in_a_row: int = 10  # so many skipped steps one after another stop the stage, too
    tensorboard: bool = False
    loss_by_source: bool = False  # a step that is printed also has the loss of each source and language
    wandb: str = ""  # project of Weights & Biases that gets the numbers, too; "": none
    profile: tuple[int, ...] = ()  # (first, last) step to profile into workdir/profile
    compile_cache: str = ""  # folder that keeps compiled programs between runs; "" is JAX's own default
    lost_seconds: float = 30.0  # a host that is silent for so long is lost: the others stop, with exit code 75
    mesh: tuple[int, ...] = ()  # data, fsdp, context, tensor; -1 takes what is left, () is by stage and chip
    accumulate: int = 0  # parts of a batch computed one after another; 0 is by stage and chip


@dataclasses.dataclass(frozen=True)
class EvalConfig(Section):
    """What is measured while a stage trains, on what it does not train on; nothing where `every` is 0."""

    PATH = "config.eval"

    every: int = 0  # steps; each measurement follows a save, the last step's too
    held_out: tuple[str, ...] = ()  # annotation files, as in data.train, whose loss is measured: the score "loss"
    benchmarks: tuple[str, ...] = ()  # names (docs/evaluation.md), or FILE.jsonl of conversations with answers
    data: str = ""  # folder of the benchmarks' files
    prompt: str = ""  # style of the benchmarks' prompts; "" is each one's first
    share: float = 1.0  # of each benchmark's questions, always the same ones
    best: str = ""  # the score whose best checkpoint is kept: "loss" or a benchmark's name; "" is the first
    patience: int = 0  # the stage ends after so many measurements in a row that are no better; 0: never


@dataclasses.dataclass(frozen=True)
class StageConfig(Section):
    """A training stage."""

    PATH = "config"

    @classmethod
    def load(cls, spec: str) -> "StageConfig":
        """The stage of `FILE[:PRESET]` (`config_files.load_config`). Raises UserError."""
        return cls.from_config(load_config(spec))

    stage: str = ""  # name of the stage; a folder of the curriculum's workdir
    model: ModelConfig = ModelConfig()
    init_from: str = ""  # checkpoint folder whose weights the stage starts from; "" is a fresh start
    init_other_rope: bool = False  # True: the stage may change the rope settings of init_from, as for longer contexts
    allow_changes: tuple[str, ...] = ()  # keys ("model.llm.rope_theta", ...) that may differ from the checkpoint's
    seed: int = 0
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()


_STAGES = {
    "kangaroo_8b": StageConfig(),
    "kangaroo_3b": StageConfig(model=_3B),
    "kangaroo_1b": StageConfig(model=_1B),
    "kangaroo_smol": StageConfig(model=_SMOL),
    "base_100m": StageConfig(model=_BASE),
    "smol": StageConfig(
        model=_SMALL_SMOL,
        data=DataConfig(
            image_size=56,
            max_sample_tokens=768,
            tokens_per_pack=768,
            packing_bins=8,
            packs_per_batch=2,
            cache_mib=128,
        ),
        optimizer=OptimizerConfig(frozen_dtype="float32"),
        train=TrainConfig(checkpoint_minutes=10, keep_checkpoints=1, mesh=(1, -1, 1, 1), accumulate=2),
    ),
    "tiny": StageConfig(
        model=_TINY,
        data=DataConfig(
            image_size=48,
            max_sample_tokens=1024,
            packing_bins=8,
            tokens_per_pack=512,
            frames_per_pack=48,
            packs_per_batch=4,
            cache_mib=512,
        ),
        optimizer=OptimizerConfig(kind="muon"),  # learns from scratch what the others have from pretraining
        train=TrainConfig(log_every=10, checkpoint_every=100, mesh=(1, -1, 1, 1), accumulate=1),
    ),
}
PRESETS = tuple(_STAGES)


def stage_config(preset: str) -> ConfigDict:
    """Defaults of a training stage, to be changed by its file in `configs/`.

    The presets are `kangaroo_8b` (published sizes), `kangaroo_3b` and `kangaroo_1b` (with Llama 3.2), `kangaroo_smol`
    (with SmolLM2-135M), `base_100m` (benchmarks), `smol` and `tiny` (the quickstart's, on a CPU). Raises ValueError for
    another.
    """
    if preset not in _STAGES:
        raise ValueError(f"unknown preset {preset!r}: one of {', '.join(PRESETS)}")
    return ConfigDict(dataclasses.asdict(_STAGES[preset]))


def model_config(preset: str) -> ConfigDict:
    """The model of a preset. Raises ValueError for an unknown one."""
    return stage_config(preset).model


def lock(config: ConfigDict) -> ConfigDict:
    """Lock a finished config: an unknown key is then an error that names the nearest known one."""
    return config.lock()


def to_plain(config: StageConfig) -> dict[str, Any]:
    """A stage as plain dictionaries, their keys in the order of the alphabet, for JSON."""
    plain: dict[str, Any] = ConfigDict(dataclasses.asdict(config)).to_dict()
    return plain


def frames_per_group(model: ModelConfig) -> int:
    """How many frames stand behind one group of vision tokens: what the patchify joins, 1 where it is bypassed."""
    return model.patchify.kernel[0] if model.patchify.enabled else 1


def tokens_per_group(model: ModelConfig, image_size: int) -> int:
    """Vision tokens of one temporal group of frames of `image_size` pixels."""
    grid = image_size // model.vision.patch_size
    _, rows, columns = model.patchify.kernel if model.patchify.enabled else (1, 1, 1)
    return (grid // rows) * (grid // columns)
