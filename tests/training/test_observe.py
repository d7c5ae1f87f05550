"""FLOPs against the published conventions, MFU by both of them, and what else is said of the machine's use."""

import jax
import pytest

from kangaroo_jax.chips import Chip
from kangaroo_jax.config import StageConfig, stage_config
from kangaroo_jax.training import observe
from kangaroo_jax.training.flops import part_trains, step_flops
from kangaroo_jax.training.observe import Observer

ALL, DECODER_FROZEN = ((".*", 1.0),), (("llm/.*", None), (".*", 1.0))
PROJECTOR_ONLY = (("projector/.*", 1.0), (".*", None))


@pytest.fixture
def config():
    """Sizes that no two of are the same, so that none can stand for another."""
    config = stage_config("tiny")
    model, data = config.model, config.data
    model.vision.update(patch_size=4, width=24, depth=3, heads=2, mlp_width=36, pos_embed_grid=4)
    model.llm.update(vocab_size=101, width=40, depth=5, heads=4, kv_heads=2, head_dim=8, mlp_width=56)
    model.patchify.update(enabled=True, kernel=(2, 2, 2))
    model.projector = "mlp2x_gelu"
    data.update(packs_per_batch=6, tokens_per_pack=128, frames_per_pack=10, image_size=16)
    config.optimizer.trainable = ALL
    return StageConfig.from_config(config)


TOKENS, FRAMES, PATCHES = 6 * 128, 6 * 10, 16
LAYER = 40 * (4 * 8) * 2 + 40 * (2 * 8) * 2 + 3 * 40 * 56  # weights of a decoder layer's matrices
VISION_LAYER = 4 * 24 * 24 + 3 * 24 * 36
GROUP_ROWS = FRAMES // 2 * 4


def test_a_step_that_trains_all_is_six_flops_a_weight_and_token_and_palms_attention(config):
    """Chowdhery et al. 2022, appendix B: 6 N + 12 L H Q T a token; the causal half of the scores is half of that."""
    flops = step_flops(config)
    assert flops.llm_linear == 6 * 5 * LAYER * TOKENS
    assert flops.head == 6 * 40 * 101 * TOKENS
    attention = 12 * 5 * (4 * 8) * 128 * TOKENS
    assert (flops.llm_attention_full, flops.llm_attention_causal) == (attention, attention / 2)
    vision = 6 * (3 * VISION_LAYER * (PATCHES + 1) + 3 * 4 * 4 * 24 * PATCHES) + 12 * 3 * 24 * (PATCHES + 1) ** 2
    assert flops.vision == vision * FRAMES
    assert flops.projector == 6 * (24 * 40 + 40 * 40) * GROUP_ROWS
    parts = flops.vision + flops.projector + flops.llm_linear + flops.head
    assert flops.full == parts + attention and flops.causal == parts + attention / 2
    assert flops.vision_share == flops.vision / flops.causal
    # FlashAttention's backward computes the scores once more: 2 T^2 N H of 4 forward.
    forward = attention / 3
    assert flops.score_recomputation == pytest.approx(forward / 4 + FRAMES * 2 * 3 * (PATCHES + 1) ** 2 * 24)


@pytest.mark.parametrize(
    ("trainable", "times"),
    [(ALL, (3, 3, 3)), (DECODER_FROZEN, (3, 3, 2)), (PROJECTOR_ONLY, (1, 2, 2)), (((".*", None),), (1, 1, 1))],
    ids=["all", "decoder_frozen", "projector_only", "nothing"],
)
def test_what_is_frozen_has_no_gradient_of_its_weights_and_none_at_all_where_nothing_below_trains(
    config, trainable, times
):
    whole, flops = step_flops(config), step_flops(config.changed({"optimizer.trainable": trainable}))
    shares = [getattr(flops, part) / getattr(whole, part) for part in ("vision", "projector", "llm_linear")]
    assert shares == pytest.approx([time / 3 for time in times])
    assert flops.head / whole.head == pytest.approx(times[2] / 3)
    backward = times[2] > 1
    assert flops.llm_attention_full == whole.llm_attention_full * (1 if backward else 1 / 3)
    assert (flops.score_recomputation > 0) == backward


def test_parts_train_as_the_rules_say(config):
    config = config.changed({"optimizer.trainable": (("llm/.*", None), ("patchify/.*", None), (".*", 1.0))})
    trained = {part: part_trains(part, config) for part in ("vision", "patchify", "projector", "llm")}
    assert trained == {"vision": True, "patchify": False, "projector": True, "llm": False}
    assert part_trains("special_embedding", config)


def test_logits_count_for_the_targets_that_are_asked_for_and_a_linear_projector_is_one_matrix(config):
    assert step_flops(config, head_tokens=100).head == 6 * 40 * 101 * 100
    config = config.changed({"model.projector": "linear", "model.patchify.enabled": False})
    assert step_flops(config).projector == 6 * 24 * 40 * FRAMES * PATCHES
    config = config.changed({"data.frames_per_pack": 0, "optimizer.trainable": PROJECTOR_ONLY})
    flops = step_flops(config)  # nothing below the decoder trains where there are no frames
    assert flops.vision == 0 and flops.llm_linear == 2 * 5 * LAYER * TOKENS and flops.score_recomputation == 0


CHIP = Chip("imagined", "imagined", tflops=0.001, gib=1.0, hbm_gb=1.0, link_gb=1.0)


def make(config, tmp_path, chip=CHIP):
    lines: list[str] = []
    return Observer(config, chip, workdir=tmp_path, tell=lines.append), lines


def test_mfu_is_the_models_flops_over_the_peak_of_all_devices_in_both_conventions(config, tmp_path):
    observer, _ = make(config, tmp_path)
    flops, seconds = step_flops(config), 4.0
    possible = 0.001 * 1e12 * jax.device_count() * seconds
    values = observer.values(3, seconds)
    assert values["mfu_causal"] == pytest.approx(3 * flops.causal / possible, abs=1e-4)
    assert values["mfu_full"] == pytest.approx(3 * flops.full / possible, abs=1e-4)
    assert 0.01 < values["mfu_causal"] < values["mfu_full"] < 1
    without, _ = make(config, tmp_path, chip=None)
    assert not {"mfu_causal", "mfu_full"} & set(without.values(3, seconds))


class Step:
    """A jitted function of which only the number of its compiled forms is known."""

    def __init__(self) -> None:
        self.compiled = 1

    def _cache_size(self) -> int:
        return self.compiled


@pytest.fixture
def clock(monkeypatch):
    now = [50.0]
    monkeypatch.setattr(observe.time, "perf_counter", lambda: now[0])
    return now


def test_goodput_leaves_out_the_start_and_a_step_that_is_compiled_again_is_told(config, tmp_path, clock):
    (observer, lines), step = make(config, tmp_path), Step()
    clock[0] += 6
    observer.step(1, step)
    assert observer.values(1, 6.0)["goodput"] == 0  # the first one compiles
    for number in (2, 3):
        clock[0] += 1
        observer.step(number, step)
    assert observer.values(2, 2.0)["goodput"] == pytest.approx(2 / 8) and not lines
    step.compiled = 2
    clock[0] += 8
    observer.step(4, step)
    assert len(lines) == 1 and lines[0].startswith("warning: step 4 was compiled again")
    assert observer.values(1, 8.0)["goodput"] == pytest.approx(2 / 16)
    clock[0] += 4
    observer.step(5, step)
    assert observer.values(1, 4.0)["goodput"] == pytest.approx(6 / 20) and len(lines) == 1


def test_a_profile_is_of_the_steps_asked_for_and_is_ended_once(config, tmp_path, monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(observe.jax.profiler, "start_trace", lambda path: calls.append(f"start {path}"))
    monkeypatch.setattr(observe.jax.profiler, "stop_trace", lambda: calls.append("stop"))
    config = config.changed({"train.profile": (3, 4)})
    observer, lines = make(config, tmp_path)
    for number in range(1, 8):
        observer.step(number, Step())
        calls.append(str(number))
    observer.close()
    assert calls == ["1", "2", f"start {tmp_path / 'profile'}", "3", "4", "stop", "5", "6", "7"]
    assert lines == [f"profile of steps 3 to 4 in {tmp_path / 'profile'}"]
    observer, lines = make(config, tmp_path)
    observer.step(3, Step())
    observer.close()  # a stage that ends amid its profile
    assert calls[-1] == "stop" and len(lines) == 1
