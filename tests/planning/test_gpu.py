"""Programs for GPUs that are not here: what is said without their compiler, and what they are with it."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kangaroo_jax.chips import CHIPS, parse_topology
from kangaroo_jax.config import StageConfig
from kangaroo_jax.errors import UserError
from kangaroo_jax.models import attention_tokamax
from kangaroo_jax.models.attention import attention
from kangaroo_jax.models.attention_triton import tiles_for, triton, visited_share
from kangaroo_jax.planning import gpu, hlo, plan, report
from kangaroo_jax.sharding import make_mesh

MISSING = gpu.why_not(CHIPS["H100"])
needs_compiler = pytest.mark.skipif(bool(MISSING), reason=MISSING or "needs the compiler")

KERNEL = """HloModule k

ENTRY %main (q: bf16[2,256,4,128], k: bf16[2,256,2,128]) -> bf16[2,256,4,128] {
  %q = bf16[2,256,4,128]{3,2,1,0} parameter(0)
  %k = bf16[2,256,2,128]{3,2,1,0} parameter(1)
  ROOT %y = bf16[2,256,4,128]{3,2,1,0} custom-call(%q, %k), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/llm/triton_causal/attention_d_key_128/pallas_call"}
}
"""  # noqa: E501


def test_the_work_of_a_kernel_is_that_of_its_blocks():
    (visit,) = (visit for visit in hlo.walk(KERNEL) if visit.operation.kind == "custom-call")
    share = visited_share(256, 256, tiles_for(9.0, 128).d_key, True)
    expected = 2 * 4 * 2 * 4 * 256 * 256 * 128 * share  # four products, two rows, four heads
    assert gpu.attention_flops(visit, CHIPS["H100"]) == pytest.approx(expected) and 0.5 < share < 1


def test_why_a_gpu_is_not_compiled_for_says_what_to_do(monkeypatch):
    versions = {"jax": "0.10.2"}
    monkeypatch.setattr(gpu, "_version", lambda package: versions.get(package, ""))
    monkeypatch.setattr(gpu, "ptxas", lambda: None)
    assert "no facts for the compiler about a T4" in gpu.why_not(CHIPS["T4"])
    assert "not installed" in gpu.why_not(CHIPS["H100"]) and "plan-gpu" in gpu.why_not(CHIPS["H100"])
    versions["jax-cuda13-plugin"] = "0.9.1"
    assert "CUDA plugin is 0.9.1, JAX 0.10.2" in gpu.why_not(CHIPS["H100"])
    versions["jax-cuda13-plugin"] = "0.10.2"
    assert "ptxas is not installed" in gpu.why_not(CHIPS["H100"])
    monkeypatch.setattr(gpu, "ptxas", lambda: "ptxas")
    assert gpu.why_not(CHIPS["H100"]) == ""
    with pytest.raises(UserError, match="H100:9: 9 GPUs are not spread evenly over 2 nodes"):
        gpu.topology_devices(parse_topology("H100:9"))


def test_the_facts_of_a_gpu_are_those_of_its_chip():
    for name, facts in gpu.FACTS.items():
        chip, text = CHIPS[name], gpu.target_text(CHIPS[name])
        assert facts.memory > chip.gib * 2**30 > 0.9 * facts.memory and name in facts.name
        assert f"core_count: {facts.processors}\n" in text and f"major: {int(chip.capability)} minor" in text
    assert [gpu.arch(CHIPS[name]) for name in ("A100", "L4", "H100")] == ["sm_80", "sm_89", "sm_90a"]


# ----------------------------------------------------------------- what the compiler makes of it


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["H100", "A100"])
@pytest.mark.parametrize(("length", "kv_heads", "width", "causal"), [(8192, 2, 128, True), (1025, 8, 64, False)])
def test_no_kernel_spills_and_hopper_multiplies_by_warp_groups(name, length, kv_heads, width, causal):
    """The kernels of a decoder, and those of a ViT."""
    target = parse_topology(f"{name}:1")
    mesh = make_mesh((1, 1, 1, 1), gpu.topology_devices(target))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def step(query, key, value, segments, weight):
        run = lambda *x: triton(*x, (segments, segments) if causal else None, causal=causal)  # noqa: E731
        output, backward = jax.vjp(run, query, key, value)
        return output, backward(weight)

    shapes = [((1, length, heads, width), jnp.bfloat16) for heads in (8, kv_heads, kv_heads)]
    shapes += [((1, length), jnp.int32), shapes[0]]
    with jax.set_mesh(mesh):
        traced = jax.jit(step).trace(*(jax.ShapeDtypeStruct(*shape, sharding=everywhere) for shape in shapes))
        program, kernels = gpu.compile_lowered(traced.lower(lowering_platforms=("cuda",)), target.chip)
    assert [kernel.name for kernel in kernels] == [f"{kind} {width}" for kind in ("d_key", "d_query", "forward")]
    assert [kernel.spilled for kernel in kernels] == [0, 0, 0], kernels
    assert all(kernel.wgmma for kernel in kernels) == (name == "H100")
    work = sum(gpu.attention_flops(visit, target.chip) for visit in hlo.walk(program.as_text()))
    assert work == pytest.approx(9 * 2 * 8 * width * length**2 * (0.5 if causal else 1), rel=0.02)


@needs_compiler
@pytest.mark.skipif(not attention_tokamax.installed(), reason="needs tokamax")
@pytest.mark.slow
def test_auto_is_tokamax_on_hopper():
    target = parse_topology("H100:1")
    (device,) = gpu.topology_devices(target)
    mesh = make_mesh((1, 1, 1, 1), [device])
    everywhere = NamedSharding(mesh, PartitionSpec())

    def step(query, key, value, segments):
        run = lambda *x: attention(*x, segment_ids=(segments, segments), causal=True).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(run, argnums=(0, 1, 2))(query, key, value)

    shapes = [((1, 1024, heads, 128), jnp.bfloat16) for heads in (8, 2, 2)] + [((1, 1024), jnp.int32)]
    with jax.set_mesh(mesh), jax.default_device(device):
        traced = jax.jit(step).trace(*(jax.ShapeDtypeStruct(*shape, sharding=everywhere) for shape in shapes))
        program, kernels = gpu.compile_lowered(traced.lower(lowering_platforms=("cuda",)), target.chip)
    text = program.as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 3 and kernels == []
    work = sum(gpu.attention_flops(visit, target.chip) for visit in hlo.walk(text))
    assert work == 9 * 2 * 8 * 128 * 1024**2 / 2


@needs_compiler
@pytest.mark.slow
def test_a_step_is_compiled_for_gpus_that_are_not_here(make_micro_config, tmp_path):
    config = make_micro_config()
    config.model.vision.update(width=32, mlp_width=64)  # XLA finds no tiles by formula for products of 24
    config.model.llm.update(width=64, mlp_width=128, vocab_size=512, head_dim=64, heads=4, kv_heads=2)
    config.data.update(packs_per_batch=8, tokens_per_pack=1024, frames_per_pack=16)
    config.model.dtype, config.optimizer.kind = "bfloat16", "adamw"
    config, target = StageConfig.from_config(config), parse_topology("A100:8")
    made = plan.make_plan(config, target, mfu=0.4, cache=tmp_path)
    assert made.source == "compiled" and made.not_compiled == "" and made.fits and made.peak_hbm_gib < 1
    assert {kernel["name"] for kernel in made.kernels} == {"d_key 64", "d_query 64", "forward 64"}
    assert made.collectives_gib["all-gather"] > 0 and 0.9 < made.compiled_over_model_flops < 3
    (kept,) = tmp_path.iterdir()
    assert json.loads(kept.read_text())["kernels"] == made.kernels
    assert "forward 64 " in report.text(made) and " registers" in report.text(made)
    assert plan.make_plan(config, target, mfu=0.4, cache=tmp_path) == made
