"""The HLO walker on programs whose work is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kangaroo_jax.planning import hlo
from kangaroo_jax.sharding import make_mesh


def text_of(function, *shapes) -> str:
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile().as_text()


def flops(text: str, **options) -> float:
    return sum(hlo.matmul_flops(visit) for visit in hlo.walk(text, **options))


def test_a_product_and_a_product_with_batch_dimensions():
    assert flops(text_of(lambda a, b: a @ b, (16, 32), (32, 48))) == 2 * 16 * 32 * 48
    einsum = lambda a, b: jnp.einsum("bnth,bnsh->bnts", a, b)  # noqa: E731
    assert flops(text_of(einsum, (2, 3, 40, 8), (2, 3, 56, 8))) == 2 * 2 * 3 * 40 * 56 * 8


def test_loops_count_every_trip_also_inside_each_other_and_backwards():
    def layers(x, weights):
        def outer(x, _):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0], None

        return jnp.sum(jax.lax.scan(outer, x, None, length=3)[0])

    one = 2 * 24 * 32 * 32
    assert flops(text_of(layers, (24, 32), (7, 32, 32))) == 3 * 7 * one
    gradient = text_of(jax.grad(layers, argnums=(0, 1)), (24, 32), (7, 32, 32))
    assert flops(gradient) == 3 * 3 * 7 * one
    remat = jax.grad(lambda x, w: layers(x, w) + 0.0 * jnp.sum(x), argnums=1)
    assert flops(text_of(remat, (24, 32), (7, 32, 32))) <= 3 * 3 * 7 * one


def test_a_loop_that_only_the_run_can_count_takes_the_given_number():
    def function(x, w, n):
        return jax.lax.fori_loop(0, n.astype(jnp.int32)[0], lambda i, x: x @ w, x)

    text = text_of(function, (8, 8), (8, 8), (1,))
    assert flops(text, unknown_trips=1) == 2 * 8**3 and flops(text, unknown_trips=5) == 5 * 2 * 8**3


# As a TPU program writes products: convolutions, with batch dimensions as windows of one valid place each.
TPU = """HloModule m, is_scheduled=true

%body (p: (s32[], bf16[128,1024])) -> (s32[], bf16[128,1024]) {
  %p = (s32[]{:T(128)}, bf16[128,1024]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %w = bf16[1024,1024]{1,0} constant({...})
  %one = s32[]{:T(128)} constant(1)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[128,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %y = bf16[128,1024]{1,0:T(8,128)} convolution(%x, %w), dim_labels=bf_io->bf, metadata={op_name="jit(f)/llm/dot"}
  %g = bf16[128,4096]{1,0} all-gather(%y), channel_id=1, replica_groups=[8,4]<=[32], dimensions={1}
  %n = s32[]{:T(128)} add(%i, %one)
  ROOT %t = (s32[]{:T(128)}, bf16[128,1024]{1,0}) tuple(%n, %y)
}

%condition (p: (s32[], bf16[128,1024])) -> pred[] {
  %limit = s32[]{:T(128)} constant(8)
  %p = (s32[]{:T(128)}, bf16[128,1024]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (a: bf16[128,1024], b: bf16[4,64,16], c: bf16[4,16,32]) -> bf16[128,1024] {
  %a = bf16[128,1024]{1,0} parameter(0)
  %b = bf16[4,64,16]{2,1,0} parameter(1)
  %c = bf16[4,16,32]{2,1,0} parameter(2)
  %two = s32[]{:T(128)} constant(2)
  %batch = bf16[4,64,32]{2,1,0} convolution(%b, %c), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
  %kernel = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 1024}"
}}, metadata={op_name="jit(f)/splash"}
  %init = (s32[]{:T(128)}, bf16[128,1024]{1,0}) tuple(%two, %a)
  %loop = (s32[]{:T(128)}, bf16[128,1024]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %result = bf16[128,1024]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_tpu_programs_loops_from_their_counter_batches_from_their_window_and_collectives():
    visits = list(hlo.walk(TPU))
    by_name = {visit.operation.name: visit for visit in visits}
    assert by_name["y"].times == 6 and hlo.matmul_flops(by_name["y"]) == 6 * 2 * 128 * 1024 * 1024
    assert hlo.matmul_flops(by_name["batch"]) == 2 * 4 * 64 * 32 * 16
    assert by_name["y"].operation.scope == "jit(f)/llm/dot" and by_name["kernel"].operation.scope == "jit(f)/splash"
    assert hlo.collective(by_name["g"].operation) == ("all-gather", 128 * 4096 * 2)


def test_collectives_of_a_real_program_have_their_kind_and_bytes():
    mesh = make_mesh((1, 8, 1, 1), jax.devices()[:8])
    place = lambda *names: NamedSharding(mesh, PartitionSpec(*names))  # noqa: E731
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=place("fsdp"))
    text = jax.jit(lambda x: x * 2, out_shardings=place()).lower(x).compile().as_text()
    found = [hlo.collective(visit.operation) for visit in hlo.walk(text)]
    assert [pair for pair in found if pair] == [("all-gather", 64 * 32 * 4)]
    summed = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=place()).lower(x).compile().as_text()
    found = [hlo.collective(visit.operation) for visit in hlo.walk(summed)]
    assert [pair for pair in found if pair] == [("all-reduce", 32 * 4)]


# As a program for GPUs joins several arrays in one collective, and says what goes in and what comes out.
GPU = """HloModule g

ENTRY %main (a: f32[64,32], b: bf16[64]) -> bf16[8] {
  %a = f32[64,32]{1,0} parameter(0)
  %b = bf16[64]{0} parameter(1)
  %s = ((f32[64,32]{1,0}, bf16[64]{0}), (f32[8,32]{1,0}, /*index=3*/bf16[8]{0})) reduce-scatter-start(%a, %b), replica_groups={{0,1,2,3,4,5,6,7}}
  %d = (f32[8,32]{1,0}, bf16[8]{0}) reduce-scatter-done(%s)
  %x = f32[8,32]{1,0} get-tuple-element(%d), index=0
  %y = bf16[8]{0} get-tuple-element(%d), index=1
  %g = ((f32[8,32]{1,0}, bf16[8]{0}), (f32[64,32]{1,0}, bf16[64]{0})) all-gather-start(%x, %y), dimensions={0}
  %p = (f32[8,32]{1,0}, f32[8,32]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %r = (f32[8,32]{1,0}, bf16[8]{0}) all-reduce-start(%x, %y), to_apply=%add
  ROOT %end = bf16[8]{0} copy(%y)
}
"""  # noqa: E501


def test_a_collective_of_several_arrays_counts_them_all_and_only_once():
    both = 64 * 32 * 4 + 64 * 2
    assert [found for visit in hlo.walk(GPU) if (found := hlo.collective(visit.operation))] == [
        ("reduce-scatter", both),
        ("all-gather", both),
        ("collective-permute", 8 * 32 * 4),
        ("all-reduce", both // 8),
    ]


# As a TPU program writes a reduce-scatter, and an all-reduce beside it.
SCATTERED = """HloModule s, is_scheduled=true

%all-reduce-scatter.3.clone (input.17: bf16[4096,512]) -> bf16[1024,512] {
  %input.17 = bf16[4096,512]{1,0} parameter(0)
  %all-reduce.79 = bf16[4096,512]{1,0} all-reduce(%input.17), channel_id=28, replica_groups={{0,1,2,3}}, to_apply=%add
  %partition-id.43 = u32[] partition-id()
  %constant.1294 = u32[] constant(1024)
  %multiply.506 = u32[] multiply(%partition-id.43, %constant.1294)
  %constant.1295 = u32[] constant(0)
  ROOT %slice = bf16[1024,512] dynamic-slice(%all-reduce.79, %multiply.506, %constant.1295), dynamic_slice_sizes={1024,512}
}

ENTRY %main (a: bf16[4096,512]) -> bf16[1024,512] {
  %a = bf16[4096,512]{1,0} parameter(0)
  %r = bf16[4096,512]{1,0} all-reduce(%a), channel_id=29, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %fusion.486 = bf16[1024,512]{1,0} fusion(%r), kind=kCustom, calls=%all-reduce-scatter.3.clone
}
"""  # noqa: E501


def test_an_all_reduce_whose_parts_alone_are_kept_is_a_reduce_scatter():
    found = [(kind, moved) for kind, moved, _ in hlo.moves(hlo.parse(SCATTERED))]
    assert found == [("all-reduce", 4096 * 512 * 2), ("reduce-scatter", 4096 * 512 * 2)]


# As a TPU program spreads a collective over fusions: it stands in the first, in those beside it and in the last.
FUSED = """HloModule m, is_scheduled=true

%start (a: bf16[4096,1024]) -> (bf16[4096,1024], bf16[4096,4096]) {
  %a = bf16[4096,1024]{1,0} parameter(0)
  %g.1 = bf16[4096,4096]{1,0} all-gather(%a), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={1}
  ROOT %s = (bf16[4096,1024], bf16[4096,4096]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%beside (b: bf16[4096,1024], x: bf16[512,512]) -> bf16[512,512] {
  %b = bf16[4096,1024]{1,0} parameter(0)
  %x = bf16[512,512]{1,0} parameter(1)
  %g.2 = bf16[4096,4096]{1,0} all-gather(%b), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={1}
  ROOT %y = bf16[512,512]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%done (c: bf16[4096,1024]) -> bf16[4096,4096] {
  %c = bf16[4096,1024]{1,0} parameter(0)
  %g.3 = bf16[4096,4096]{1,0} all-gather(%c), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={1}
  ROOT %e = bf16[4096,4096]{1,0} custom-call(%g.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[4096,1024], x: bf16[512,512]) -> bf16[4096,4096] {
  %a = bf16[4096,1024]{1,0} parameter(0)
  %x = bf16[512,512]{1,0} parameter(1)
  %r = bf16[512,512]{1,0} all-reduce(%x), channel_id=3, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  %one = (bf16[4096,1024], bf16[4096,4096]) fusion(%a), kind=kCustom, calls=%start
  %p = bf16[4096,1024]{1,0} get-tuple-element(%one), index=0
  %two = bf16[512,512]{1,0} fusion(%p, %r), kind=kOutput, calls=%beside, \
metadata={op_name="jit(f)/llm/dot"}, backend_config={"window_config":{"estimated_cycles":"150000"}}
  ROOT %three = bf16[4096,4096]{1,0} fusion(%p), kind=kCustom, calls=%done
}
"""


def test_a_collective_that_is_spread_over_fusions_counts_once():
    found = [(kind, moved, hlo.group(visit.operation)) for kind, moved, visit in hlo.moves(hlo.parse(FUSED))]
    assert found == [("all-reduce", 512 * 512 * 2, [0, 2, 4, 6]), ("all-gather", 4096 * 4096 * 2, [0, 1, 2, 3])]
    assert flops(FUSED) == 2 * 512**3


@pytest.mark.parametrize(
    ("written", "devices"),
    [
        ("replica_groups={{0,3},{1,2}}", [0, 3]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,2,2]T(1,2,0)", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'a','b'}", [0, 2]),
        ("source_target_pairs={{5,6},{6,7}}", [5, 6]),
        ("channel_id=1", []),
    ],
)
def test_groups_are_read_in_each_spelling(written, devices):
    operation = hlo.parse(f"ENTRY %m (a: f32[8]) -> f32[8] {{\n  %a = f32[8] all-reduce(%b), {written}\n}}")
    assert hlo.group(operation.computations["m"]["a"]) == devices


def test_no_module_is_an_error():
    with pytest.raises(ValueError, match="ENTRY"):
        list(hlo.walk("nothing"))


def test_places_in_a_padded_window_are_not_counted():
    image = jax.lax.conv_general_dilated
    shapes = (1, 1, 6, 6), (1, 1, 3, 3)
    text = text_of(lambda x, k: image(x, k, (1, 1), "SAME"), *shapes)
    valid = np.sum([min(i + 1, 5) - max(i - 1, 0) + 1 for i in range(6)]) ** 2
    assert flops(text) in (2 * valid, 2 * 36 * 9)  # a CPU may rewrite the convolution as a product
