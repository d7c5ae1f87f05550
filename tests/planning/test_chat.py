"""The plan of an engine: memory and bounds against known numbers, mistakes, and programs compiled for a TPU."""

import json

import jax
import pytest

from kangaroo_jax.chips import CHIPS, parse_topology
from kangaroo_jax.cli import main as cli
from kangaroo_jax.config import StageConfig
from kangaroo_jax.inference import weights
from kangaroo_jax.inference.programs import Programs
from kangaroo_jax.planning import chat, chat_work, hlo
from kangaroo_jax.planning.chat_work import Talk
from kangaroo_jax.planning.compile import topology_devices
from kangaroo_jax.sharding import make_mesh

from .test_plan import needs_libtpu

CONFIG = "--config=stage5_long_video:kangaroo_8b"
GIB = 1 << 30


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        code = cli.main(["plan", "--mode=chat", *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def talk(quantize: str | None = "int8", kv_dtype: str | None = None, slots: int = 1) -> Talk:
    return Talk(StageConfig.load("stage5_long_video:kangaroo_8b"), quantize, kv_dtype, slots, 160)


def test_what_an_8b_engine_holds_is_what_its_numbers_take():
    asked = talk()
    assert (asked.video_tokens, asked.context) == (80 * 257 + 2, 22656)
    one = chat_work.held(asked, (1, 1, 1, 1))
    maps = 32 * (4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336)
    assert one.decoder == pytest.approx(maps, rel=2e-3)  # and scales and norms
    assert one.embedding == 2 * 128258 * 4096 or one.embedding == pytest.approx(2 * 128256 * 4096, rel=1e-3)
    assert one.large == 2 * 32 * 8 * 128 * 2 * asked.capacity and one.slot > one.large
    plain = chat_work.held(talk(None), (1, 1, 1, 1))
    assert plain.decoder == pytest.approx(2 * maps, rel=1e-3) and plain.vision == one.vision
    narrow = chat_work.held(talk(kv_dtype="int8"), (1, 1, 1, 1))
    assert narrow.large == pytest.approx(one.large * (128 + 4) / 256)  # a scale a token, beside 128 numbers
    quarter = chat_work.held(talk(None), (1, 1, 1, 4))
    assert 4 * quarter.weights == pytest.approx(plain.weights, rel=1e-2) and 4 * quarter.large == plain.large


def test_bounds_are_by_bandwidth_and_by_products():
    asked, target = talk(slots=4), parse_topology("v5e:1x1")
    one = chat_work.held(asked, (1, 1, 1, 1))
    found = chat_work.bounds(asked, target, one)
    step = (one.decoder + one.head + one.large) / (CHIPS["v5e"].hbm_gb * 1e9)
    assert found.tokens_per_second["1"] == pytest.approx(1 / step, rel=1e-3)
    assert 1 < found.tokens_per_second["4"] / found.tokens_per_second["1"] < 4
    products = (116 + 399) / 197  # TFLOP of the ViT and the decoder over 160 frames
    assert products < found.first_token_seconds < 1.25 * products
    assert found.of_it_encode_seconds == pytest.approx(116 / 197, rel=0.02)
    assert step < found.next_round_seconds < 0.05 * found.first_token_seconds


def test_a_gpu_is_planned_by_formula(capsys):
    code, out, _ = run(capsys, CONFIG, "--topology=L4:1", "--frames=160", "--quantize=int8", "--json")
    found = json.loads(out)
    assert code == 0 and found["source"] == "formula" and found["fits"] and found["conversations"] == 3
    code, out, _ = run(capsys, CONFIG, "--topology=L4:1", "--frames=160", "--slots=4")
    assert code == chat.DOES_NOT_FIT and "DOES NOT FIT; nearest change that does: --slots=1" in out
    code, out, _ = run(capsys, CONFIG, "--topology=H100:4", "--slots=2")
    assert code == 0 and "26,624 tokens in all" in out and "kangaroo serve" in out and "tensor 4" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([CONFIG, "--topology=H100:1", "--quantize=int3"], "--quantize=int3: use one of int8, int4"),
        ([CONFIG, "--topology=H100:1", "--kv-dtype=fp8"], "kv_dtype 'fp8': use int8"),
        ([CONFIG, "--topology=H100:1", "--frames=7"], "--frames=7: must be a multiple of 2"),
        ([CONFIG, "--topology=H100:1", "--slots=17"], "--slots=17: 17 slots of one class"),
        ([CONFIG, "--topology=H100:16"], "plan for 1, 2, 4, 8 devices, not 16"),
        ([CONFIG, "--topology=H100:8", "--slices=2"], "one engine answers on one slice"),
        ([CONFIG, "--topology=H100:8", "--search"], "--search does not go with --mode=chat"),
        ([CONFIG, "--topology=H100:8", "--mode=talk"], "--mode=talk: train, chat or kernels"),
        ([CONFIG, "--topology=H100:8", "--mode=train", "--slots=1"], "--slots does not go with --mode=train"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    code, _, error = run(capsys, *arguments)
    assert code == 2 and message in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_step_on_a_mesh_moves_activations_and_no_weights(make_micro_config):
    config = make_micro_config()
    config.model.llm.update(vocab_size=4096, kv_heads=4, heads=4)
    asked = Talk(StageConfig.from_config(config), None, None, 2, 0)
    mesh = make_mesh((1, 1, 1, 4), jax.devices()[:4])
    programs = Programs(weights.abstract(asked.model, None), asked.sizes, mesh=mesh)
    step = programs.lower(("decode", asked.capacity, 2), "cpu").compile()
    moved = [size for _, size, _ in hlo.moves(hlo.parse(step.as_text()))]
    assert moved and max(moved) <= 4 * 4096 * 2  # the logits, float32, of two rows


# ------------------------------------------------------------------- compiled for TPUs, by libtpu


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:1x1", "v6e:1x1", "v5p:1x1x1", "v5e:1x2", "v5e:2x4"])
def test_a_slice_may_be_smaller_than_a_host(name):
    target = parse_topology(name)
    assert len(topology_devices(target)) == target.devices


@pytest.mark.slow
@needs_libtpu
def test_programs_of_a_small_engine_are_compiled_for_one_chip_and_for_four(make_micro_config, tmp_path):
    config = make_micro_config()
    with config.unlocked():
        config.model.llm.update(width=512, heads=4, kv_heads=4, head_dim=128, mlp_width=1024, vocab_size=1024, depth=2)
    asked = Talk(StageConfig.from_config(config), "int8", "int8", 2, 16)
    peaks = {}
    for name in ("v5e:1x1", "v5e:2x2"):
        found = chat.make_chat_plan(asked, parse_topology(name), tmp_path)
        assert found.fits and found.source == "compiled" and set(found.programs) == set(asked.programs())
        one = chat_work.held(asked, asked.mesh(parse_topology(name)))
        decode = found.programs["decode 2"]["argument_gib"] * GIB
        least = one.weights + 2 * (one.large + one.own)
        assert least <= decode <= 1.2 * least + (1 << 20)  # with the padding of small arrays
        peaks[name] = found.peak_hbm_gib
    assert peaks["v5e:2x2"] < peaks["v5e:1x1"]
    assert len(list(tmp_path.glob("*.json"))) == 2 * len(asked.programs())
