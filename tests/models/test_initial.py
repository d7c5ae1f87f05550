"""Fresh weights: the deviation of every kind of matrix, zeros and ones where they belong, no two layers alike."""

import jax
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax.models.kangaroo import KangarooModel
from kangaroo_jax.models.parameters import Binding
from tests.models.small import small_config

DEPTH = {"llm": 2, "vision": 3}


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """The weights of a model wide enough for a deviation to be seen."""
    config = small_config(
        **dict(vision__width=64, vision__heads=4, vision__mlp_width=96, vision__depth=3, vision__pos_embed_grid=6),
        **dict(llm__width=80, llm__heads=6, llm__kv_heads=2, llm__head_dim=16, llm__mlp_width=112),
        llm__vocab_size=200,
    )
    make = lambda: KangarooModel(config, rngs=nnx.Rngs(0))  # noqa: E731
    binding = Binding(nnx.eval_shape(make))
    return {path: np.asarray(x) for path, x in jax.jit(lambda: binding.flatten(make()))().items()}


def fan_in(path: str, shape: tuple[int, ...]) -> int:
    shape = shape[1:] if "/layers/" in path or "/blocks/" in path else shape
    return int(np.prod(shape[:2])) if path.startswith("llm") and path.endswith("out/kernel") else shape[0]


def test_matrices_have_the_deviation_of_their_inputs_and_those_that_end_a_layer_less_the_deeper_it_is(weights):
    for path, x in weights.items():
        if not path.endswith("/kernel") or path.startswith("patchify"):
            continue
        expected = fan_in(path, x.shape) ** -0.5
        if path.endswith(("attention/out/kernel", "mlp/down/kernel")):
            expected *= (2 * DEPTH[path.split("/")[0]]) ** -0.5
        assert abs(x.std() / expected - 1) < 0.05, path
        assert abs(x.mean()) < 0.05 * expected, path
        assert 1.9 < np.abs(x).max() / expected * 0.8796256610342398 <= 2.0001, path  # cut at two deviations


def test_embeddings_norms_and_biases(weights):
    assert weights["llm/embedding"].std() == pytest.approx(80**-0.5, rel=0.03)
    assert weights["special_embedding"].std() == pytest.approx(80**-0.5, rel=0.1)
    assert weights["vision/position_embedding"].std() == pytest.approx(0.02, rel=0.05)
    assert weights["vision/cls_token"].std() == pytest.approx(0.02, rel=0.25)
    assert weights["vision/position_embedding"].shape == (1 + 6 * 6, 64)
    assert np.all(weights["patchify/kernel"] == 1 / 8) and weights["patchify/kernel"].shape == (2, 2, 2, 64)
    for path, x in weights.items():
        if path.endswith("/scale"):
            assert np.all(x == 1), path
        if path.endswith("/bias"):
            assert np.all(x == 0), path


def test_which_maps_have_a_bias(weights):
    biased = {path.removesuffix("/bias") for path in weights if path.endswith("/bias")}
    linear = {path.removesuffix("/kernel") for path in weights if path.endswith("/kernel")}
    assert {path for path in biased & linear if path.startswith("llm")} == set()
    plain = {path for path in linear - biased if not path.startswith("llm")}
    assert plain == {"vision/blocks/attention/key"}  # EVA-02's keys have none


def test_no_two_layers_and_no_two_weights_begin_alike(weights):
    drawn = {path: x for path, x in weights.items() if x.std() > 0}
    firsts = [float(x.ravel()[0]) for x in drawn.values()]
    assert len(set(firsts)) == len(firsts)
    for path, x in drawn.items():
        if "/layers/" in path or "/blocks/" in path:
            assert not np.allclose(x[0], x[1]), path
