"""The plan: formulas against known numbers, work and traffic of compiled steps, and the job itself."""

import dataclasses
import json
import re
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from kangaroo_jax.chips import CHIPS, find_chip, parse_topology
from kangaroo_jax.cli import main as cli
from kangaroo_jax.config import STAGES, StageConfig
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.kangaroo import count_parameters
from kangaroo_jax.models.layers import Linear
from kangaroo_jax.planning import compile as plan_compile
from kangaroo_jax.planning import formula as plan_formula
from kangaroo_jax.planning import gpu, hlo, plan, report
from kangaroo_jax.planning.packing import packed
from kangaroo_jax.sharding import make_mesh, sharding
from kangaroo_jax.training.flops import step_flops
from kangaroo_jax.training.placement import resolve
from kangaroo_jax.training.step import TPU_OPTIONS, compiler_options

KEYS = {
    "fits", "peak_hbm_gib", "capacity_gib", "params_b", "model_tflops_causal", "model_tflops_full", "vit_share",
    "compiled_over_model_flops", "step_seconds", "chip_hours", "cost", "mesh", "compile_seconds",
}  # fmt: skip


def libtpu_is_missing() -> str:
    """Why nothing can be compiled for a TPU here."""
    try:
        plan_compile.check_libtpu()
    except UserError as error:
        return str(error)
    return ""


needs_libtpu = pytest.mark.skipif(bool(libtpu_is_missing()), reason=libtpu_is_missing() or "needs libtpu")


@pytest.fixture
def config(make_micro_config):
    config = make_micro_config()
    config.model.vision.update(width=32, mlp_width=64)
    config.model.llm.update(width=64, mlp_width=128, vocab_size=512)
    config.data.update(packs_per_batch=8, tokens_per_pack=128, frames_per_pack=16)
    config.train.mesh = (2, 2, 1, 2)
    config.optimizer.kind = "adamw"  # Muon's products of a weight with itself are no part of the model's work
    return StageConfig.from_config(config)


def compiled_on_cpu(config) -> str:
    config = resolve(config, None, 8 if np.prod(config.train.mesh) != 1 else 1)
    devices = jax.devices()[: int(np.prod(config.train.mesh))]
    return plan_compile.lower_step(config, devices).compile().as_text()


def work(text: str, part: str = "") -> float:
    return sum(hlo.matmul_flops(visit) for visit in hlo.walk(text) if part in visit.operation.scope)


# --------------------------------------------------------------------------------- formulas


def test_flops_of_llama_are_six_per_weight_and_token_and_frozen_parts_cost_less():
    config = StageConfig.load("stage4_instruct:kangaroo_8b").changed({"data.packs_per_batch": 1})
    flops, counts = step_flops(config), count_parameters(config.model)
    tokens = config.data.tokens_per_pack
    in_products = counts["llm"] - config.model.llm.vocab_size * config.model.llm.width  # all but the embedding
    assert flops.llm_linear + flops.head == pytest.approx(6 * in_products * tokens, rel=1e-3)
    assert flops.llm_attention_full == 12 * 32 * tokens**2 * 4096 == 2 * flops.llm_attention_causal
    vision = 96 * (6 * 304.1e6 * 1025 + 12 * 24 * 1025**2 * 1024)
    assert flops.vision == pytest.approx(vision, rel=0.01)
    vision_frozen = config.changed({"optimizer.trainable": (("vision/.*", None), (".*", 1.0))})
    assert step_flops(vision_frozen).vision == pytest.approx(flops.vision / 3)
    decoder_frozen = config.changed({"optimizer.trainable": (("(vision|projector)/.*", 1.0), (".*", None))})
    assert step_flops(decoder_frozen).llm_linear == pytest.approx(flops.llm_linear * 2 / 3)


def test_chips_are_found_by_what_jax_calls_them():
    for kind, name in {
        "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
        "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200", "NVIDIA A100-SXM4-80GB": "A100", "Tesla T4": "T4",
    }.items():  # fmt: skip
        found = find_chip(kind)
        assert found is not None and found.name == name, kind
    assert find_chip("cpu") is None
    assert parse_topology("v5p:2x2x4").devices == 16 and parse_topology("h100:8", 4).devices == 32


@pytest.mark.parametrize("stage", STAGES)
def test_made_up_samples_fit_the_rows_of_the_smallest_stages(stage):
    assert 0.5 < packed(StageConfig.load(f"{stage}:tiny")).useful <= 1


@pytest.mark.parametrize("text", ["v9:4x8", "v5e", "v5e:", "v5e:4x", "H100:0", "v5e:2x2x2x2"])
def test_bad_topologies_are_one_line(text):
    with pytest.raises(UserError, match="topology"):
        parse_topology(text)


def test_the_packing_share_of_every_stage_is_a_share():
    for stage in STAGES:
        found = packed(StageConfig.load(f"{stage}:kangaroo_8b"))
        assert 0.5 < found.useful <= 1 and 0 < found.pairs < found.visited <= 1, (stage, found)


def test_every_stage_is_placed_on_every_slice():
    for name, size in (("v5e", "4x8"), ("v5p", "2x2x4"), ("v6e", "4x8"), ("v6e", "4x4"), ("H100", "8")):
        target = parse_topology(f"{name}:{size}")
        for stage in STAGES:
            config = resolve(StageConfig.load(f"{stage}:kangaroo_8b"), target.chip, target.devices)
            assert np.prod(config.train.mesh) == target.devices and config.train.accumulate >= 1
            assert config.model.llm.remat != "auto"
    two = resolve(StageConfig.load("stage4_instruct:kangaroo_8b"), CHIPS["v5e"], 64, 2)
    assert two.train.mesh[0] == 2


def test_more_chips_than_packs_share_rows():
    """On a TPU by context, on a GPU (whose attention has no context axis) by tensor."""
    config = StageConfig.load("stage5_long_video:kangaroo_8b")
    assert config.data.packs_per_batch == 64
    assert resolve(config, CHIPS["v5p"], 64).train.mesh == (1, 64, 1, 1)
    assert resolve(config, CHIPS["v5p"], 256).train.mesh == (1, 64, 4, 1)
    assert resolve(config, CHIPS["v5e"], 1024, 2).train.mesh == (2, 32, 8, 2)
    assert resolve(config, CHIPS["H100"], 128).train.mesh == (1, 64, 1, 2)


def test_a_batch_that_does_not_fit_the_mesh_is_one_line():
    config = StageConfig.load("stage5_long_video:kangaroo_8b")
    config = config.changed({"data.packs_per_batch": 12, "train.mesh": (1, 8, 1, 4)})
    with pytest.raises(UserError, match="packs_per_batch 12 must be a multiple of 8"):
        resolve(config, CHIPS["v5e"], 32)


# ----------------------------------------------------------------- compiled steps, on the CPU


def test_eight_devices_do_no_more_work_than_one(config):
    """Neither the ViT nor anything else is computed twice, though the mesh has a tensor axis."""
    eight = compiled_on_cpu(config)
    one = compiled_on_cpu(config.changed({"train.mesh": (1, 1, 1, 1)}))
    assert 8 * work(eight, "vision") <= 1.02 * work(one, "vision")
    assert 8 * work(eight) <= 1.02 * work(one)


def test_frozen_parts_add_no_gradient_collectives_and_logits_are_not_gathered(config):
    config = config.changed({"train.mesh": (1, 8, 1, 1)})
    moved = {}
    for name, rules in (("frozen", (("llm/.*", None), (".*", 1.0))), ("trained", ((".*", 1.0),))):
        moved[name] = 0.0
        for visit in hlo.walk(compiled_on_cpu(config.changed({"optimizer.trainable": rules}))):
            found = hlo.collective(visit.operation)
            if found and found[0] in ("all-reduce", "reduce-scatter"):
                moved[name] += found[1] * visit.times
            assert not (found and found[0] == "all-gather" and plan_compile.is_logits(visit.operation, config))
    counts = count_parameters(config.model)
    assert moved["frozen"] < 4 * 1.2 * (counts["total"] - counts["llm"]) + 4096
    assert moved["trained"] > moved["frozen"] + 4 * 0.5 * counts["llm"]


# ---------------------------------------------------------------------------------- the job


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        code = cli.main(["plan", *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def no_gpu_compiler(monkeypatch):
    monkeypatch.setattr(gpu, "why_not", lambda chip: "the compiler is not installed: pip install x")


def test_gpus_without_their_compiler_are_planned_by_formula(capsys, no_gpu_compiler):
    stage = "--config=stage5_long_video:kangaroo_8b"
    code, out, _ = run(capsys, stage, "--topology=H100:64", "--json", "--price-per-chip-hour=2.5")
    found = json.loads(out)
    assert code == 0 and KEYS <= set(found) and found["source"] == "formula" and found["fits"]
    assert found["cost"] == pytest.approx(2.5 * found["chip_hours"], rel=1e-3)
    assert found["not_compiled"] == "the compiler is not installed: pip install x"
    code, out, _ = run(capsys, stage, "--topology=T4:8")
    assert "not compiled, by formula: the compiler is not installed: pip install x" in out
    assert code == plan.DOES_NOT_FIT and "DOES NOT FIT" in out and "nearest change" in out
    code, out, _ = run(capsys, "--curriculum", "--topology=H200:64", "--price-per-chip-hour=3")
    assert code == 0 and out.count("| stage") == 1 + len(STAGES) and "| sum |" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5e:4x8"], "--config is missing"),
        (["--config=stage3_refine"], "--topology is missing"),
        (["--config=stage3_refine", "--topology=v5e:4x8", "--mfu=2"], "--mfu=2"),
        (["--config=stage3_refine", "--topology=x:1"], "no chip 'x'"),
        (["--config=stage3_refine", "--topology=v5e:4x8", "--parts"], "--parts goes with --table=FILE"),
        (["--config=stage3_refine", "--topology=v5e:4x8", "--before=x"], "--before goes with --table=FILE"),
        (["--table=docs/plan_compiled.jsonl", "--before=docs/plan_before.jsonl"], "--table=FILE --parts"),
        (["--table=docs/plan_compiled.jsonl", "--parts", "--before=docs/plan_chat.jsonl"], "--mode=chat and of"),
        (["--mode=kernels", "--topology=H100:8"], "schedules are read for v4, v5e, v5p, v6e, not H100"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    code, _, error = run(capsys, *arguments)
    assert code == 2 and message in error and error.count("\n") == 1


def test_the_nearest_change_fits_by_the_formula_that_said_no():
    config, target = StageConfig.load("stage5_long_video:kangaroo_8b"), parse_topology("V100:8")
    counts = count_parameters(config.model)
    before = plan.make_plan(config, target, mfu=0.4)
    assert not before.fits
    change = plan.nearest_change(config, target, before)
    assert change.startswith("--")
    if change.startswith("--topology"):
        bigger = parse_topology(change.removeprefix("--topology="))
        fitted = resolve(config, bigger.chip, bigger.devices)
        assert plan_formula.peak_gib(fitted, counts) <= bigger.chip.gib


def test_a_sum_has_what_every_stage_foretells(no_gpu_compiler):
    made = plan.make_plan(StageConfig.load("stage3_refine:kangaroo_8b"), parse_topology("H100:64"), mfu=0.4, price=2.0)
    known = dataclasses.replace(made, foretold_seconds=2.0, foretold_chip_hours=10.5, foretold_mfu_causal=0.375)
    assert (
        report.total([known, known])["foretold_chip_hours"] == 21
        and report.total([known, made])["cost"] == 2 * made.cost
    )
    assert report.total([known, made])["foretold_chip_hours"] is None
    lines = report.table([known, known], with_sum=True).splitlines()
    assert "foretold MFU" in lines[0] and "| 38% |" in lines[2] and "| 21 |" in lines[-1]


@pytest.mark.parametrize("name", ["plan_compiled.jsonl", "plan_chat.jsonl", "plan_gpu.jsonl"])
def test_the_tables_of_the_docs_are_made_of_the_kept_plans(capsys, name):
    docs = Path(__file__).parents[2] / "docs"
    code, out, _ = run(capsys, f"--table={docs / name}")
    page = (docs / "plan.md").read_text(encoding="utf-8")
    assert code == 0 and out.count("\n") > 4 and out in page
    code, out, error = run(capsys, f"--table={docs / name}", "--parts")
    assert code == 0 and (name != "plan_compiled.jsonl" or out in page)


def test_what_has_changed_stands_before_and_after(capsys):
    docs = Path(__file__).parents[2] / "docs"
    where = f"--table={docs / 'plan_compiled.jsonl'}", "--parts"
    code, out, _ = run(capsys, *where, f"--before={docs / 'plan_before.jsonl'}")
    assert code == 0 and out in (docs / "plan.md").read_text(encoding="utf-8")
    assert out.count(", before |") == out.count("| after |") == out.count("\n") // 2 - 1 > 4
    code, out, _ = run(capsys, *where, f"--before={docs / 'plan_compiled.jsonl'}")
    assert code == 0 and out.count("\n") == 2


def test_a_file_that_is_no_table_is_told_by_its_line(capsys, tmp_path):
    docs, broken = Path(__file__).parents[2] / "docs", tmp_path / "plans.jsonl"
    broken.write_text('{"stage": 1}\n')
    code, _, error = run(capsys, f"--table={broken}")
    assert code == 2 and "line 1: not a line of kangaroo plan --json" in error
    lines = [(docs / name).read_text().splitlines()[0] for name in ("plan_compiled.jsonl", "plan_chat.jsonl")]
    broken.write_text("\n".join(lines))
    code, _, error = run(capsys, f"--table={broken}")
    assert code == 2 and "one table has one of them" in error
    assert run(capsys, f"--table={tmp_path / 'none'}")[0] == 2


# ------------------------------------------------------------------- compiled for TPUs, by libtpu


@pytest.mark.parametrize(
    "installed, message",
    [(None, "needs libtpu: pip install"), ("0.0.1", r"libtpu 0\.0\.1 is not of the release that jax")],
)
def test_a_libtpu_that_does_not_go_with_jax_is_refused_before_anything_is_compiled(installed, message, monkeypatch):
    def version(name: str) -> str:
        if name == "libtpu" and installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed if name == "libtpu" else jax.__version__

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(UserError, match=message):
        plan_compile.topology_devices(parse_topology("v5e:2x2"))


def memory_on_v5e(function, *arguments, **options):
    device = plan_compile.topology_devices(parse_topology("v5e:2x2"))[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    traced = jax.jit(function, **options).trace(*arguments)
    return traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()


@needs_libtpu
def test_the_peak_of_known_programs_is_what_the_compiler_compares_with_the_chip():
    def floats(gib):
        return jax.ShapeDtypeStruct((gib, 1 << 28), jnp.float32)

    def peak_gib(*arguments, **options):
        return plan_compile.peak_bytes(memory_on_v5e(*arguments, **options)) / (1 << 30)

    assert peak_gib(lambda x: x + 1, floats(1)) == pytest.approx(2, abs=0.01)
    assert peak_gib(lambda x: x + 1, floats(1), donate_argnums=0) == pytest.approx(1, abs=0.01)
    with pytest.raises(jax.errors.JaxRuntimeError) as refusal:
        peak_gib(lambda x: x + 1, floats(8))
    seconds: plan_compile.Seconds = {"lower_seconds": 1.0, "compile_seconds": 2.0, "compile_cpu_seconds": 3.0}
    found = plan_compile._too_large(str(refusal.value), seconds)
    assert not found.fits and found.peak_gib == pytest.approx(16, abs=0.01) and found.compile_cpu_seconds == 3


@pytest.mark.slow
@needs_libtpu
def test_a_step_fits_whose_arguments_and_temporaries_sum_to_more_than_the_chip_has():
    def step(state, x):
        def loss(weights):
            @jax.checkpoint
            def layer(x, w):
                return x + jnp.tanh(x @ w[0].astype(x.dtype)) @ w[1].astype(x.dtype), None

            return jnp.sum(jax.lax.scan(layer, x, weights)[0].astype(jnp.float32) ** 2)

        weights, momentum = state
        momentum = jax.tree.map(lambda m, d: 0.9 * m + d, momentum, jax.grad(loss)(weights))
        return jax.tree.map(lambda w, m: w - m, weights, momentum), momentum

    weights = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((12, 2048, 8192), (12, 8192, 2048))]
    x = jax.ShapeDtypeStruct((100_000, 2048), jnp.bfloat16)
    memory = memory_on_v5e(step, (weights, weights), x, donate_argnums=0)
    capacity = CHIPS["v5e"].gib * (1 << 30)
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes > capacity > plan_compile.peak_bytes(memory)


@pytest.mark.slow
@needs_libtpu
def test_a_tpu_step_is_compiled_here_with_splash_attention(config, tmp_path):
    """A small model on eight v5e chips: the kernels are there, and the work is the model's."""
    model = dataclasses.replace(
        config.model,
        dtype="bfloat16",
        vision=dataclasses.replace(config.model.vision, width=128, depth=2, heads=2, mlp_width=256),
        llm=dataclasses.replace(
            config.model.llm, width=256, heads=4, kv_heads=2, head_dim=128, mlp_width=512, remat="none"
        ),
    )
    config = config.changed({"model": model, "data.tokens_per_pack": 2048, "train.mesh": (1, 4, 1, 2)})
    target = parse_topology("v5e:2x4")
    found = plan.make_plan(config, target, mfu=0.5, cache=tmp_path)
    assert found.fits and found.source == "compiled" and 0 < found.peak_hbm_gib < 2 and not found.gathers_logits
    assert sum(found.parts.values()) == pytest.approx(found.foretold_seconds, abs=2e-3) and found.foretold_mfu_causal
    assert found.parts["llm_attention"] > 0 and found.parts["vision_products"] > 0
    resolved = resolve(config, target.chip, 8)
    compiled = plan_compile.compile_step(resolved, target, tmp_path, packed(resolved, 1).visited)
    assert compiled.flops["attention_llm"] > 0 and compiled.flops["attention_vision"] > 0
    assert len(list(tmp_path.glob("*.json"))) == 1


@needs_libtpu
def test_no_product_of_the_vit_is_cut_into_one_for_each_device():
    """A product of a ViT whose weight 32 devices share, and its gradients: no transfer from neighbour to neighbour."""
    mesh = make_mesh((1, 8, 1, 4), plan_compile.topology_devices(parse_topology("v5e:4x8")))
    axes, rows = ("vision_embed", "vision_mlp"), ("frames", None, None)

    def array(shape, axes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, axes, shape))

    def sliced(options) -> int:
        step = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=options).trace(state, *arrays)
        program = step.lower(lowering_platforms=("tpu",)).compile()
        return len(re.findall(r" collective-permute(-start)?\(", program.as_text()))

    with jax.set_mesh(mesh):
        options = dict(bias=False, param_dtype=jnp.float32)
        linear = nnx.eval_shape(lambda: Linear((1024,), (2752,), axes, rngs=nnx.Rngs(0), **options))
        graph, state = nnx.split(linear)
        state = jax.tree.map(lambda x: array(x.shape, axes, x.dtype), state)
        arrays = array((96, 1025, 1024), rows), array((96, 1025, 2752), rows)
        loss = lambda state, x, w: jnp.sum((nnx.merge(graph, state)(x) * w).astype(jnp.float32))  # noqa: E731
        assert sliced(TPU_OPTIONS) == 0 < sliced(None)


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5p:2x2x4", "v6e:4x8"])
def test_weights_are_gathered_beside_products(topology):
    """Two products with weights that all devices share, layer by layer: fewer gathers are waited for than without."""
    devices = plan_compile.topology_devices(parse_topology(topology))
    mesh = make_mesh((1, len(devices), 1, 1), devices)
    place = lambda *names: NamedSharding(mesh, PartitionSpec(*names))  # noqa: E731
    weights = jax.ShapeDtypeStruct((4, 2, 4096, 4096), jnp.bfloat16, sharding=place(None, None, "fsdp"))
    x = jax.ShapeDtypeStruct((len(devices) * 4096, 4096), jnp.bfloat16, sharding=place("fsdp"))

    def in_line(options) -> int:
        def layer(x, pair):
            for w in pair:
                x = jax.nn.silu(jax.lax.with_sharding_constraint(x @ w, place("fsdp")))
            return x, None

        step = jax.jit(lambda x, w: jax.lax.scan(layer, x, w)[0], compiler_options=options).trace(x, weights)
        program = hlo.parse(step.lower(lowering_platforms=("tpu",)).compile().as_text())
        started = hlo.identities_started(program)
        gathers = [v.operation for v in hlo.walk(program) if v.operation.kind == "all-gather"]
        return sum(hlo.identity(one) not in started for one in gathers)

    windowed = "xla_jf_spmd_threshold_for_windowed_einsum_mib"
    assert in_line(compiler_options(devices[0])) < in_line({windowed: TPU_OPTIONS[windowed]})


def test_options_of_the_compiler_are_those_of_the_chip_and_give_way_to_the_users(monkeypatch):
    def options(kind: str, platform: str = "tpu"):
        return compiler_options(SimpleNamespace(platform=platform, device_kind=kind))

    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    limit = "xla_tpu_scoped_vmem_limit_kib"
    assert options("TPU v6 lite") == {**TPU_OPTIONS, limit: str(CHIPS["v6e"].vmem_kib)}
    assert options("TPU of tomorrow") == TPU_OPTIONS
    assert options("NVIDIA H100 80GB HBM3", "gpu") is None
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{limit}=65536 --xla_enable_async_all_gather=false")
    assert options("TPU v6 lite").keys() == TPU_OPTIONS.keys() - {"xla_enable_async_all_gather"}
