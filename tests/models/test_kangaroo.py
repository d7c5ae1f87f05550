"""The whole model: packing is exact, options change nothing but speed, sizes are the published ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax.config import ModelConfig, PatchifyConfig, frames_per_group, tokens_per_group
from kangaroo_jax.errors import UserError
from kangaroo_jax.models import eva_clip
from kangaroo_jax.models.kangaroo import KangarooModel, count_parameters
from kangaroo_jax.sharding import make_mesh
from tests.models.small import (
    assert_trees_close,
    gradients,
    pack,
    sample,
    small_config,
    small_model,
    stack_packs,
)

SAMPLES = [sample(1, groups=2, text=9), sample(2, groups=0, text=12), sample(3, groups=1, text=7)]
BATCH = pack(SAMPLES, 64, 8)


def test_parameter_counts_of_the_published_sizes():
    counts = count_parameters(ModelConfig())
    assert counts["vision"] == 304_104_384
    assert counts["llm"] == 8_030_261_248
    assert counts["patchify"] == 1024 * 9
    assert counts["projector"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert counts["total"] == sum(count for part, count in counts.items() if part != "total")


def test_group_sizes_of_the_published_model():
    model = ModelConfig()
    assert (frames_per_group(model), tokens_per_group(model, 448)) == (2, 256)
    model = ModelConfig(patchify=PatchifyConfig(enabled=False))
    assert (frames_per_group(model), tokens_per_group(model, 224)) == (1, 256)


def test_a_pack_equals_the_weighted_mean_of_its_samples():
    alone = [gradients(pack([one], 64, 8)) for one in SAMPLES]
    total = sum(one.weights.sum() for one in SAMPLES)
    shares = [one.weights.sum() / total for one in SAMPLES]
    expected = jax.tree.map(lambda *x: sum(share * one for share, one in zip(shares, x, strict=True)), *alone)
    assert_trees_close(gradients(BATCH), expected, 1e-5)


@pytest.mark.parametrize("change", ["frames", "frame_times", "tokens"])
def test_no_token_changes_when_another_segment_does(change):
    model, batch = small_model(), BATCH
    hidden = jax.jit(lambda batch: model.hidden(batch))
    before = np.asarray(hidden(batch))
    changed = getattr(batch, change).copy()
    if change == "tokens":
        changed[batch.segment_ids == 1] = np.where(batch.vision_index >= 0, 10, 50)[batch.segment_ids == 1]
    else:
        changed[:, :4] = changed[:, :4] // 2 + 3
    after = np.asarray(hidden(batch.replace(**{change: changed})))
    others = batch.segment_ids != 1
    np.testing.assert_array_equal(before[others], after[others])
    assert np.abs(before - after)[~others].max() > 1e-3


def test_later_tokens_do_not_change_earlier_ones():
    model = small_model()
    batch = sample(4, groups=1, text=20)
    tokens = batch.tokens.copy()
    tokens[:, -5:] = 33
    hidden = jax.jit(lambda batch: model.hidden(batch))
    before, after = (np.asarray(hidden(b)) for b in (batch, batch.replace(tokens=tokens)))
    np.testing.assert_array_equal(before[:, :-5], after[:, :-5])


def test_scanned_and_unrolled_layers_agree():
    assert_trees_close(gradients(BATCH, scan=False), gradients(BATCH), 1e-5)


def test_layers_apart_are_the_stacked_ones():
    model, apart = small_model(), small_model().unstack()
    both = jax.jit(lambda batch: (apart.logits(batch), model.logits(batch)))
    np.testing.assert_allclose(*both(BATCH), atol=1e-5)
    names = {"/".join(map(str, path)): weight.axes for path, weight in nnx.to_flat_state(nnx.state(apart))}
    assert names["llm/layers/1/mlp/up/kernel"] == ("embed", "mlp")
    abstract = nnx.eval_shape(small_model)
    shapes = [leaf.shape for leaf in jax.tree.leaves(nnx.state(abstract.unstack()))]
    assert shapes == [leaf.shape for leaf in jax.tree.leaves(nnx.state(apart))]


@pytest.mark.parametrize(("policy", "scan"), [("dots", True), ("context", True), ("full", True), ("minimal", False)])
def test_remat_policies_give_the_same_loss_and_gradients(policy, scan):
    changed = gradients(BATCH, vision__remat=policy, llm__remat=policy, scan=scan)
    assert_trees_close(changed, gradients(BATCH), 1e-5)


def test_tokens_that_a_kernel_needs_for_whole_blocks_change_nothing(monkeypatch):
    """The encoder adds them before queries, keys and values are made, and takes them off what attention gives."""
    expected = gradients(BATCH)
    monkeypatch.setattr(eva_clip, "padding", lambda implementation, length, head_dim: -length % 16)
    assert_trees_close(gradients(BATCH), expected, 1e-5)


def test_a_batch_without_frames():
    loss, gradient = gradients(pack([SAMPLES[1]], 64, 0))
    assert_trees_close(loss, gradients(pack([SAMPLES[1]], 64, 8))[0], 1e-6)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient["vision"]))


def test_padding_gives_no_nan_and_an_empty_pack_no_loss():
    empty = jax.tree.map(np.zeros_like, BATCH).replace(vision_index=np.full_like(BATCH.vision_index, -1))
    loss, gradient = gradients(stack_packs([BATCH, empty]))
    assert np.isfinite(loss) and all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    assert_trees_close((loss, gradient), gradients(BATCH), 1e-5)
    assert [float(x) for x in jax.jit(small_model().loss)(empty)] == [0.0, 0.0]


def test_bfloat16_computation_stays_close_to_float32():
    loss, gradient = gradients(BATCH, dtype="bfloat16")
    expected, _ = gradients(BATCH)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))
    assert abs(float(loss - expected)) < 0.02 * float(expected)


def test_frozen_weights_may_be_bfloat16():
    model = small_model()
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model)))
    loss, hidden = jax.jit(lambda batch: (model.loss(batch)[0], model.hidden(batch)))(BATCH)
    assert loss.dtype == jnp.float32 and np.isfinite(loss)
    assert hidden.dtype == jnp.float32


def test_marks_have_embeddings_of_their_own():
    model = small_model()
    tokens = np.asarray([[6, 7, 8, 9, 20]])
    x = model.embed(tokens, np.full((1, 5), -1), None)
    np.testing.assert_array_equal(x[0, :4], model.special_embedding[...])
    np.testing.assert_array_equal(x[0, 4], model.llm.embedding[...][20])


def test_the_patchify_starts_as_average_pooling_and_may_be_bypassed():
    pooled, single = small_model(), small_model(patchify__enabled=False)
    batch = sample(6, groups=1, text=2)
    shape_of = lambda model: jax.eval_shape(lambda: model.encode(batch.frames, batch.frame_times)).shape  # noqa: E731
    assert shape_of(pooled) == (1, 4, 24)
    assert shape_of(single) == (1, 2 * 16, 24)


def test_a_frame_has_the_time_of_its_fraction_of_a_second():
    """Vision tokens are the pooled and projected features plus the sinusoids of the seconds, as NumPy has them."""
    model, (side, width) = small_model(), (16, 16)
    times = np.asarray([[0.25, 0.7, 3.375, 3.875]], np.float32)
    frames = np.random.default_rng(0).integers(0, 256, (1, 4, side, side, 3)).astype(np.uint8)
    angles = times[0, :, None] / 10_000.0 ** (np.arange(0, width, 2) / width)
    time = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(4, 1, width)

    @jax.jit
    def both():
        timed = (model.vision(jnp.asarray(frames[0])) + time).reshape(2, 2, 2, 2, 2, 2, width)  # groups, frames, rows
        return model.encode(frames, times), model.projector(timed.mean(axis=(1, 3, 5)).reshape(1, 8, width))

    assert_trees_close(*both(), 1e-4)


def test_fewer_groups_of_frames_than_devices():
    """Groups are added so that every device has as many, and taken away again."""
    model, random = small_model(), np.random.default_rng(0)
    frames = random.integers(0, 256, (1, 6, 16, 16, 3)).astype(np.uint8)
    times = np.sort(random.uniform(0, 9, (1, 6))).astype(np.float32)
    encode = jax.jit(lambda frames, times: model.encode(frames, times))
    expected = encode(frames, times)
    with jax.set_mesh(make_mesh((1, 2, 2, 2))):
        found = encode(frames, times)
    assert found.shape == (1, 3 * 4, 24)
    assert_trees_close(found, expected, 1e-5)


def test_a_patchify_that_is_no_cube():
    config = small_config(patchify__kernel=(2, 1, 4))
    assert (frames_per_group(config), tokens_per_group(config, 16)) == (2, 4 * 1)
    frames, times = np.zeros((1, 4, 16, 16, 3), np.uint8), np.zeros((1, 4), np.float32)
    model = nnx.eval_shape(lambda: KangarooModel(config, rngs=nnx.Rngs(0)))
    assert jax.eval_shape(lambda model: model.encode(frames, times), model).shape == (1, 2 * 4, 24)


@pytest.mark.parametrize("part", ["vision", "llm"])
def test_each_part_uses_the_attention_that_is_set(part):
    """An implementation that refuses to run here is refused by both."""
    model = nnx.eval_shape(lambda: KangarooModel(small_config(attention="splash"), rngs=nnx.Rngs(0)))
    ids = np.zeros((1, 4), np.int32)
    run = {
        "vision": lambda model: model.vision(jnp.zeros((1, 16, 16, 3), jnp.uint8)),
        "llm": lambda model: model.llm(model.llm.embed(ids), ids, ids),
    }
    with pytest.raises(UserError, match="attention 'splash' does not run on this device"):
        jax.eval_shape(run[part], model)


def test_logits_are_float32_of_states_in_bfloat16():
    llm = small_model().llm
    assert llm.unembed(jnp.ones((1, 2, 24), jnp.bfloat16)).dtype == jnp.float32


def test_logits_give_the_loss():
    model, batch = small_model(), BATCH
    log, loss = jax.jit(lambda batch: (jax.nn.log_softmax(model.logits(batch)), model.loss(batch)[0]))(batch)
    expected = -np.sum(np.take_along_axis(np.asarray(log), batch.targets[..., None], -1)[..., 0] * batch.weights)
    assert_trees_close(loss, expected, 1e-5)


def test_every_weight_has_an_axis_name_for_every_dimension_and_no_value_is_needed():
    model = nnx.eval_shape(lambda: KangarooModel(small_config(), rngs=nnx.Rngs(0)))
    for path, weight in nnx.to_flat_state(nnx.state(model)):
        assert len(weight.axes) == len(weight.shape), path
        assert ("layers" in weight.axes) == any(part in ("layers", "blocks") for part in path)


@pytest.mark.parametrize(
    ("changes", "message"), [({"projector": "conv"}, "projector"), ({"attention": "flash"}, "attention")]
)
def test_unknown_choices_are_one_line_errors(changes, message):
    with pytest.raises(UserError, match=message):
        small_model(**changes).hidden(SAMPLES[0])


def test_frames_that_do_not_fit_are_one_line_errors():
    model = small_model()
    with pytest.raises(UserError, match="image_size"):
        model.encode(np.zeros((1, 2, 18, 18, 3), np.uint8), np.zeros((1, 2), np.float32))
    with pytest.raises(UserError, match="frames_per_pack"):
        model.encode(np.zeros((1, 3, 16, 16, 3), np.uint8), np.zeros((1, 3), np.float32))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_a_mesh_changes_nothing():
    batch = stack_packs([BATCH, BATCH])
    expected = gradients(batch)
    with jax.set_mesh(make_mesh((1, 2, 2, 2))):
        assert_trees_close(gradients(batch), expected, 1e-5)
