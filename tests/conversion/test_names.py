"""The table: both directions of a row undo each other, every parameter has one, offenders are all named."""

import re

import numpy as np
import pytest
from flax import nnx

from kangaroo_jax.config import model_config
from kangaroo_jax.conversion import names
from kangaroo_jax.conversion.sources import shapes_of, special_ids
from kangaroo_jax.conversion.weights import contiguous
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.parameters import Binding
from tests.models import from_fixtures

# A shape here that each arrangement is for.
SHAPES = {
    "same": (5, 7),
    "linear": (5, 7),
    "to_heads": (5, 3, 4),
    "from_heads": (3, 4, 5),
    "heads_bias": (3, 4),
    "to_rotary_heads": (5, 3, 4),
    "patches": (2 * 2 * 3, 5),
    "depthwise": (2, 3, 4, 5),
    "token": (5,),
    "positions": (10, 5),
}


def row(how: str) -> names.NameRow:
    return names.NameRow("a/b", None, "a.b", SHAPES[how], names.LAID_OUT[how](SHAPES[how]))


@pytest.mark.parametrize("how", names.LAID_OUT)
def test_here_and_there_undo_each_other(how):
    one = row(how)
    here = np.arange(np.prod(SHAPES[how])).reshape(SHAPES[how])
    there = one.there(here)
    assert there.shape == one.shape_there and sorted(there.ravel()) == list(range(here.size))
    np.testing.assert_array_equal(one.here(there), here)


@pytest.mark.parametrize("how", [how for how in names.LAID_OUT if row(how).cut_axis is not None])
def test_a_range_of_rows_there_is_a_range_here(how):
    one = row(how)
    here = np.arange(np.prod(SHAPES[how])).reshape(SHAPES[how])
    there, axis = one.there(here), one.cut_axis
    for start in range(there.shape[0] - 1):
        part = np.take(here, range(start, start + 2), axis)
        np.testing.assert_array_equal(one.here(there[start : start + 2]), part)
        np.testing.assert_array_equal(one.there(part), there[start : start + 2])


@pytest.mark.parametrize("axes", [(1, 0), (2, 0, 1), (1, 2, 0), (0, 2, 1), (3, 0, 2, 1), (0, 1)])
def test_tiles_copy_every_number(axes):
    shape = (150, 3, 140, 1)[: len(axes)] if len(axes) > 2 else (150, 300)
    array = np.arange(np.prod(shape)).reshape(shape).transpose(axes)
    copied = contiguous(array)
    assert copied.flags.c_contiguous
    np.testing.assert_array_equal(copied, array)


def test_meta_rotates_neighbours_where_we_rotate_halves():
    """Scores of rotated queries and keys are equal: theirs by complex numbers, as Meta writes it, ours by halves."""
    from kangaroo_jax.models.layers import rotary_1d, rotate_half

    rng, positions, heads, width = np.random.default_rng(0), np.asarray([[0, 3, 640]], np.int32), 2, 8
    x = rng.standard_normal((1, 3, 5)).astype(np.float32)
    one = names.NameRow("q", None, "wq", (5, heads, width), names.LAID_OUT["to_rotary_heads"]((5, heads, width)))
    weights = [rng.standard_normal((heads * width, 5)).astype(np.float32) for _ in range(2)]
    angles = positions[0][:, None] * 10_000.0 ** -(np.arange(0, width, 2) / width)

    def at_meta(weight):
        y = (x @ weight.T).reshape(1, 3, heads, width // 2, 2)
        z = (y[..., 0] + 1j * y[..., 1]) * np.exp(1j * angles)[None, :, None]
        return np.stack([z.real, z.imag], -1).reshape(1, 3, heads, width)

    def ours(weight):
        return np.asarray(
            rotate_half(np.einsum("btd,dnh->btnh", x, one.here(weight)), *rotary_1d(positions, width, 1e4))
        )

    theirs, here = ([f(w) for w in weights] for f in (at_meta, ours))
    scores = [np.einsum("btnh,bsnh->bnts", q, k) for q, k in (theirs, here)]
    np.testing.assert_allclose(*scores, atol=2e-3)


@pytest.mark.parametrize("layout", names.LAYOUTS)
def test_every_parameter_that_a_layout_covers_has_one_name(layout):
    model = model_config("kangaroo_8b")
    shapes = shapes_of(model)
    rows = names.table(layout, shapes, special_ids(model))
    assert {r.ours for r in rows} == {path for path in shapes if path.startswith(names.LAYOUTS[layout])}
    theirs = [r.theirs for r in rows if not r.rows]
    assert len(theirs) == len(set(theirs))
    sizes = sum(int(np.prod(r.shape_here)) for r in rows)
    assert sizes == sum(int(np.prod(s)) for p, s in shapes.items() if p.startswith(names.LAYOUTS[layout]))


def test_names_of_the_release():
    model = model_config("kangaroo_8b")
    rows = names.table("kangaroo", shapes_of(model), special_ids(model), patchify="video_conv")
    shapes = {r.theirs: r.shape_there for r in rows if not r.rows}
    assert shapes["model.layers.31.self_attn.k_proj.weight"] == (1024, 4096)
    assert shapes["vision_tower.blocks.23.mlp.w3.weight"] == (1024, 2730)
    assert shapes["vision_tower.blocks.0.attn.q_bias"] == (1024,)
    assert shapes["vision_tower.pos_embed"] == (1, 1025, 1024)
    assert shapes["video_conv.weight"] == (1024, 1, 2, 2, 2)
    assert shapes["mm_projector.2.weight"] == (4096, 4096)


def test_a_parameter_without_a_name_is_an_error():
    with pytest.raises(UserError, match="no name for llm/extra/kernel, llm/norm/offset"):
        shapes = {"llm/norm/scale": (4,), "llm/norm/offset": (4,), "llm/extra/kernel": (4, 4), "vision/x": (1,)}
        names.table("llama", shapes)


def test_match_names_every_offender():
    rows = [r for r in names.table("llama", shapes_of(model_config("tiny")))]
    found = {r.theirs: r.shape_there for r in rows}
    for layer in (0, 1, 2):
        del found[f"model.layers.{layer}.mlp.up_proj.weight"]
    found["model.norm.weight"] = (65,)
    found["model.layers.3.self_attn.q_proj.bias"] = found["rotary.inv_freq"] = (64,)
    with pytest.raises(UserError) as error:
        names.match(rows, found, "FILE", known=[r"rotary\..*"])
    assert str(error.value) == (
        "FILE: 5 tensors do not fit the model; missing: model.layers.{0-2}.mlp.up_proj.weight; "
        "unknown: model.layers.3.self_attn.q_proj.bias; of shape (65,) where the config wants (64,): model.norm.weight"
    )


def test_brief_joins_runs_of_layers():
    some = [f"a.layers.{i}.b" for i in (0, 1, 2, 5)] + ["c", "a.layers.7.d"]
    assert names.brief(some) == "a.layers.{0-2,5}.b, c, a.layers.7.d"


# A second list of which tensor is which, written from the other projects' own code and sharing nothing with the table:
# Hugging Face's convert_llama_weights_to_hf.py, and timm's checkpoint_filter_fn of eva.py.
META_TO_HF = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "layers.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "layers.{i}.attention.wq": "model.layers.{i}.self_attn.q_proj",
    "layers.{i}.attention.wk": "model.layers.{i}.self_attn.k_proj",
    "layers.{i}.attention.wv": "model.layers.{i}.self_attn.v_proj",
    "layers.{i}.attention.wo": "model.layers.{i}.self_attn.o_proj",
    "layers.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.feed_forward.w1": "model.layers.{i}.mlp.gate_proj",
    "layers.{i}.feed_forward.w2": "model.layers.{i}.mlp.down_proj",
    "layers.{i}.feed_forward.w3": "model.layers.{i}.mlp.up_proj",
}
EVA_TO_TIMM = (
    ("mlp.ffn_ln", "mlp.norm"),
    ("attn.inner_attn_ln", "attn.norm"),
    ("mlp.w1", "mlp.fc1_g"),
    ("mlp.w2", "mlp.fc1_x"),
    ("mlp.w3", "mlp.fc2"),
    ("attn.q_bias", "attn.q_proj.bias"),
    ("attn.v_bias", "attn.v_proj.bias"),
)


def by_path(layout: str, **options: str) -> dict[str, str]:
    return {ours: theirs for ours, _, theirs in names.entries(layout, **options)}


def test_meta_and_hugging_face_call_the_same_tensor_by_these_names():
    meta, hf = by_path("meta"), by_path("llama")
    pairs = {meta[path].removesuffix(".weight"): hf[path].removesuffix(".weight") for path in hf}
    assert meta.keys() == hf.keys() and pairs == META_TO_HF


def test_eva_and_timm_call_the_same_tensor_by_these_names():
    eva, timm = by_path("eva"), by_path("timm")
    for path, name in eva.items():
        name = name.removeprefix("visual.")
        for theirs, timms in EVA_TO_TIMM:
            name = name.replace(theirs, timms)
        assert timm[path] == name, path
    release = by_path("kangaroo")
    assert all(release[path] == name.replace("visual.", "vision_tower.") for path, name in eva.items())
    assert all(release[path] == name for path, name in by_path("llama").items())


@pytest.mark.parametrize(("fixture", "layout", "prefix"), [("llama", "llama", "llm"), ("eva", "timm", "vision")])
def test_every_tensor_of_a_fixture_is_the_one_that_the_parity_tests_load(fixture, layout, prefix):
    """Files of transformers and timm by the table, and by the list whose model gives those projects' outputs."""
    shapes = Binding(nnx.eval_shape(lambda: getattr(from_fixtures, fixture)()[0])).shapes
    weights, _, _ = from_fixtures.read({"llama": "llama_tiny", "eva": "eva02_tiny"}[fixture])
    second = {"llama": from_fixtures.LLAMA_NAMES, "eva": from_fixtures.EVA_NAMES}[fixture]
    rows = names.table(layout, {f"{prefix}/{path}": x.shape for path, x in shapes.items()})
    names.match(rows, {name: x.shape for name, x in weights.items()}, "FIXTURE")
    for row in rows:
        pattern = next(pattern for pattern in second if re.fullmatch(pattern, row.theirs))
        assert row.ours == f"{prefix}/{second[pattern]}"
        layer = re.fullmatch(pattern, row.theirs).groups()
        assert row.layer == (int(layer[0]) if layer else None)
        expected = from_fixtures.torch_layout(row.ours, weights[row.theirs]).reshape(row.shape_here)
        np.testing.assert_array_equal(row.here(weights[row.theirs]), expected)


def test_the_joint_parts_have_the_names_of_the_release():
    given = {ours: (how, theirs) for ours, how, theirs in names.entries("kangaroo") if ours[:3] in ("pro", "pat")}
    assert given == {
        "patchify/kernel": ("depthwise", "patchify.weight"),
        "patchify/bias": ("same", "patchify.bias"),
        "projector/first/kernel": ("linear", "mm_projector.0.weight"),
        "projector/first/bias": ("same", "mm_projector.0.bias"),
        "projector/second/kernel": ("linear", "mm_projector.2.weight"),
        "projector/second/bias": ("same", "mm_projector.2.bias"),
    }
    linear = by_path("kangaroo", projector="linear")
    assert (linear["projector/first/kernel"], linear["projector/first/bias"]) == (
        "mm_projector.weight",
        "mm_projector.bias",
    )


def test_the_marks_are_rows_of_the_releases_token_embedding():
    shapes = {"llm/embedding": (20, 4), "special_embedding": (4, 4)}
    rows = {r.ours: r for r in names.table("kangaroo", shapes, (6, 7, 8, 9))}
    marks = rows["special_embedding"]
    assert marks.theirs == rows["llm/embedding"].theirs == "model.embed_tokens.weight" and marks.rows == (6, 7, 8, 9)
    assert marks.cut_axis is None
    with pytest.raises(ValueError, match="embed_tokens"):
        _ = marks.shape_there
