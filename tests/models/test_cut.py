"""A decoder's layer whose tokens and weights are cut over devices: one device's numbers, and only what must move."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax.chips import parse_topology
from kangaroo_jax.config import StageConfig
from kangaroo_jax.models.cut import RESIDUAL, spread
from kangaroo_jax.models.layers import Linear
from kangaroo_jax.models.llama import MLP
from kangaroo_jax.models.stack import run_layers, stack_layers
from kangaroo_jax.planning import hlo
from kangaroo_jax.planning.compile import topology_devices
from kangaroo_jax.sharding import constrain, make_mesh, sharding
from tests.models.small import small_config
from tests.planning.test_plan import needs_libtpu

ROWS, TOKENS, WIDTH, HIDDEN = 4, 56, 16, 24


def mlp_and_weights(mesh):
    """(graph, weights on the mesh, x) of an MLP."""
    config = dataclasses.replace(small_config().llm, width=WIDTH, mlp_width=HIDDEN)
    graph, weights = nnx.split(MLP(config, rngs=nnx.Rngs(0), param_dtype=jnp.float32))
    x = jax.random.normal(jax.random.key(1), (ROWS, TOKENS, WIDTH))
    if mesh is None:
        return graph, weights, x
    put = lambda w: w.replace(jax.device_put(w[...], sharding(mesh, w.axes, w[...].shape)))  # noqa: E731
    weights = jax.tree.map(put, weights, is_leaf=lambda w: isinstance(w, nnx.Variable))
    return graph, weights, jax.device_put(x, sharding(mesh, RESIDUAL))


def gradients(graph):
    """Gradients of a loss by (weights, x), jitted."""

    def loss(weights, x):
        return jnp.sum(jnp.sin(constrain(nnx.merge(graph, weights)(constrain(x, RESIDUAL)), RESIDUAL)))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


@pytest.mark.parametrize("shape", [(1, 2, 2, 2), (1, 1, 8, 1), (2, 1, 1, 4)], ids=str)
def test_a_part_whose_tokens_are_cut_has_one_devices_gradients_and_moves_no_whole_row(shape):
    graph, weights, x = mlp_and_weights(None)
    expected = gradients(graph)(weights, x)
    mesh = make_mesh(shape, jax.devices()[:8])
    with jax.set_mesh(mesh):
        graph, weights, x = mlp_and_weights(mesh)
        compiled = gradients(graph).lower(weights, x).compile()
        found = compiled(weights, x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-5)  # they reach 100, in float32
    data, fsdp, context, tensor = shape
    a_device = ROWS // (data * fsdp) * TOKENS // context  # tokens, as its products take them
    moved = [(*hlo.collective(v.operation), v.operation) for v in hlo.walk(compiled.as_text())
             if hlo.collective(v.operation)]  # fmt: skip
    of_tokens = [(kind, op) for kind, _, op in moved for _, shape in op.shapes if WIDTH in shape and len(shape) == 3]
    assert {kind for kind, _ in of_tokens} == (set() if tensor == 1 else {"all-gather", "reduce-scatter"})
    assert all(np.prod(shape) <= a_device * WIDTH for _, op in of_tokens for _, shape in op.shapes)
    whole = 4 * WIDTH * HIDDEN // tensor  # a weight as it is used
    reduced = sum(size for kind, size, op in moved if kind == "all-reduce" and len(hlo.group(op)) > 1)
    assert reduced <= (3 * whole // (fsdp * context) if data > 1 else 0) + 64


def test_what_a_kernel_is_not_alone_in_or_does_not_divide_is_computed_as_elsewhere():
    mesh = make_mesh((1, 1, 1, 8))
    x = jax.random.normal(jax.random.key(1), (1, 64, WIDTH))
    options = dict(rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    with_bias = Linear((WIDTH,), (24,), ("embed", "mlp"), bias=True, **options)
    odd = Linear((WIDTH,), (20,), ("embed", "mlp"), bias=False, **options)
    assert odd.bare and not with_bias.bare
    with_bias.bias[...] = jnp.arange(24.0)
    expected = [with_bias(x), odd(x)]
    with jax.set_mesh(mesh):
        for one, value in zip((with_bias, odd), expected, strict=True):
            run = jax.jit(lambda x, one=one: spread(x, [one])[0])
            np.testing.assert_allclose(run(x), value, atol=1e-5)


def test_remat_policies_multiply_again_what_they_do_not_keep():
    """An MLP has nine products in a step, and its first two may come once more; its last one is never needed again."""
    make = lambda rngs: MLP(small_config().llm, rngs=rngs, param_dtype=jnp.float32)  # noqa: E731
    layers = stack_layers(make, 2, rngs=nnx.Rngs(0))
    graph, weights = nnx.split(layers)
    x = jnp.ones((1, TOKENS, small_config().llm.width))

    def products(remat: str) -> float:
        def loss(weights, x):
            step = lambda layer, x, index: x + layer(x)  # noqa: E731
            return jnp.sum(jnp.sin(run_layers(nnx.merge(graph, weights), step, x, scan=True, remat=remat)))

        text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(weights, x).compile().as_text()
        one = 2 * 2 * x.size * small_config().llm.mlp_width
        return sum(hlo.matmul_flops(visit) for visit in hlo.walk(text)) / one

    found = {remat: products(remat) for remat in ("full", "context", "minimal", "gate", "mlp", "none")}
    assert found == {"full": 11, "context": 11, "minimal": 11, "gate": 10, "mlp": 9, "none": 9}


@needs_libtpu
def test_on_a_tpu_results_are_scattered_as_they_are_summed():
    """Not summed whole on every device: an MLP and its gradients on v5e, a row's tokens cut in two and in sixteen."""
    config = dataclasses.replace(StageConfig().model.llm, width=1024, mlp_width=2048)
    devices = topology_devices(parse_topology("v5e:4x8"))
    for shape in ((1, 16, 1, 2), (1, 2, 4, 4)):
        mesh, tokens = make_mesh(shape, devices), 4096
        graph, weights = nnx.split(nnx.eval_shape(lambda: MLP(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)))
        place = lambda x, axes: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=sharding(mesh, axes, x.shape))  # noqa: B023,E731
        weights = jax.tree.map(
            lambda w: w.replace(place(w, w.axes)),  # noqa: B023
            weights,
            is_leaf=lambda w: isinstance(w, nnx.Variable),
        )
        x = place(jax.ShapeDtypeStruct((shape[1], tokens, 1024), jnp.bfloat16), RESIDUAL)
        with jax.set_mesh(mesh):
            text = gradients(graph).trace(weights, x).lower(lowering_platforms=("tpu",)).compile().as_text()
        whole = tokens // shape[2] * 1024 * 2  # bytes
        kinds = [kind for kind, moved, _ in hlo.moves(hlo.parse(text)) if moved >= whole]
        assert "reduce-scatter" in kinds and "all-reduce" not in kinds, (shape, kinds)
