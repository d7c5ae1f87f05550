"""The models give what timm, transformers and torch give from the same weights (tests/fixtures)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax.inference.memories import Chunk, Part, Step, write_tails
from kangaroo_jax.inference.sizes import TAIL
from kangaroo_jax.models.stack import unstack_layers
from tests.models import from_fixtures


def assert_close(actual, expected, tolerance=2e-5):
    """Largest absolute difference, relative to the expected output's largest value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("case", ["case56", "case112"])
def test_vision_encoder_before_and_after_the_norm(case):
    model, cases = from_fixtures.eva()
    pixels = cases[f"{case}.pixels"].transpose(0, 2, 3, 1)
    tokens = jax.jit(model.tokens)(pixels)
    assert_close(tokens[:, 1:], cases[f"{case}.patch_tokens_before_norm"])
    assert_close(model.norm(tokens), cases[f"{case}.tokens_after_norm"])


@pytest.mark.parametrize("output_norm", [False, True])
def test_what_the_encoder_gives_are_the_patches_without_cls(output_norm):
    model, cases = from_fixtures.eva()
    model.output_norm = output_norm
    given = jax.jit(lambda pixels: model(pixels))(cases["case56.pixels"].transpose(0, 2, 3, 1))
    expected = cases["case56.tokens_after_norm"][:, 1:] if output_norm else cases["case56.patch_tokens_before_norm"]
    assert_close(given, expected)


def test_position_embedding_is_resized_as_timm_does():
    model, cases = from_fixtures.eva()
    assert_close(model.positions(8)[None], cases["case112.pos_embed_resized"])
    assert model.positions(4) is model.position_embedding[...] or np.array_equal(
        model.positions(4), model.position_embedding[...]
    )


def test_llama_logits_from_ids_and_from_embeddings():
    model, cases = from_fixtures.llama()

    @jax.jit
    def logits(embeddings):
        positions = jnp.broadcast_to(jnp.arange(embeddings.shape[1]), embeddings.shape[:2])
        return model.unembed(model(embeddings, jnp.ones_like(positions), positions))

    assert_close(logits(model.embed(cases["ids"])), cases["logits"])
    assert_close(logits(jnp.asarray(cases["embeds"])), cases["logits_from_embeds"])


def test_greedy_tokens_without_a_cache():
    model, cases = from_fixtures.llama()
    expected = cases["greedy_ids"]
    ids = np.zeros_like(expected)
    ids[:, :37] = expected[:, :37]
    positions = np.arange(ids.shape[1])[None]
    step = jax.jit(lambda ids: model.unembed(model(model.embed(ids), jnp.ones_like(ids), positions)))
    for t in range(37, ids.shape[1]):
        ids[:, t] = np.argmax(step(ids)[:, t - 1], axis=-1)
    np.testing.assert_array_equal(ids, expected)


def test_greedy_tokens_through_memories():
    model, cases = from_fixtures.llama()
    model.layers = unstack_layers(model.layers)
    expected, prompt = cases["greedy_ids"], 37
    k, h, capacity = model.kv_heads, model.head_dim, 64
    larges = [Part(jnp.zeros((k, h, capacity)), jnp.zeros((k, capacity, h)))] * model.depth
    ids = expected[:, : prompt - 1]
    chunks = [Chunk(large, jnp.int32(0), 0) for large in larges]
    _, chunks = jax.jit(model.read)(model.embed(ids), np.arange(prompt - 1)[None], chunks)

    @jax.jit
    def step(token, place, tail):
        filled = jnp.full(1, prompt - 1)
        steps = [Step((chunk.layer,), (tail[i],), filled, place) for i, chunk in enumerate(chunks)]
        hidden, steps = model.read(model.embed(token[None, None]), (filled + place)[None], steps)
        return jnp.argmax(model.unembed(hidden[0, 0])), write_tails([tail], steps)[0]

    tail, token, tokens = jnp.zeros((model.depth, 2, k, TAIL, h)), expected[0, prompt - 1], []
    for place in range(expected.shape[1] - prompt):
        token, tail = step(token, np.array([place], np.int32), tail)
        tokens.append(int(token))
    np.testing.assert_array_equal(tokens, expected[0, prompt:])


def test_patchify_and_projector():
    patchify, projector, cases = from_fixtures.patchify_and_projector()
    patchified = patchify(cases["features"])
    assert_close(patchified, cases["patchified"])
    assert_close(projector(patchified), cases["projected"])


def test_an_unmapped_or_missing_weight_raises():
    model, _ = from_fixtures.llama()
    weights, _, _ = from_fixtures.read("llama_tiny")
    with pytest.raises(KeyError, match="maps to no parameter"):
        from_fixtures.load(model, {**weights, "model.rotary": weights["lm_head.weight"]}, from_fixtures.LLAMA_NAMES)
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(KeyError, match="layers/mlp/up/kernel"):
        from_fixtures.load(model, weights, from_fixtures.LLAMA_NAMES)
