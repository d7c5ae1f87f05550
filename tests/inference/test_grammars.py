"""Answers of a given form: what a grammar allows is chosen, of the others' answers nothing changes."""

import json
import re

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest

pytest.importorskip("llguidance")

from kangaroo_jax.data.annotations.conversation import Conversation, Turn
from kangaroo_jax.data.tokenizer import load_tokenizer
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference import sampling as sampling_module
from kangaroo_jax.inference.grammars import LONGEST, Grammars
from kangaroo_jax.inference.sampling import Choices, Sampling, words

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue", "红色"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "moves": {"type": "boolean"},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 2},
    },
    "required": ["colour", "count", "moves", "words"],
    "additionalProperties": False,
}
ASKED = Conversation("a", (Turn("user", "What moves?"),), ())
V = 70
choose = jax.jit(sampling_module.choose)


@pytest.fixture(scope="module")
def grammars(media):
    grammars = Grammars(load_tokenizer(media / "tokenizer.model"), 300)
    yield grammars
    grammars.close()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_guided_row_has_the_best_token_that_is_allowed_and_others_theirs(temperature):
    rng = np.random.default_rng(3)
    logits, allowed = rng.normal(size=(4, V)).astype(np.float32) * 3, rng.random((4, V)) < 0.1
    bits = np.packbits(np.pad(allowed, ((0, 0), (0, 96 - V))), axis=1, bitorder="little").view(np.uint32)
    guided = [True, False, True, False]
    seen, index = [jnp.zeros(V, jnp.int32)] * 4, jnp.arange(4)
    rows = [Sampling(temperature=temperature, seed=seed, top_p=0.9) for seed in range(4)]
    chosen = choose(logits, seen, index, Choices.of(rows, [False] * 4, guided, V), bits)
    plain = choose(logits, seen, index, Choices.of(rows, [False] * 4, [False] * 4, V), bits)
    assert allowed[0, chosen.tokens[0]] and allowed[2, chosen.tokens[2]]
    assert (chosen.tokens[1], chosen.tokens[3]) == (plain.tokens[1], plain.tokens[3])
    if not temperature:
        best = np.where(allowed, logits, -np.inf).argmax(-1)
        assert (chosen.tokens[0], chosen.tokens[2]) == (best[0], best[2])


def test_answers_have_the_form_of_a_schema_and_neighbours_say_what_they_say_alone(kangaroo):
    schema = kangaroo.grammars.of("json_schema", json.dumps(SCHEMA))
    drawn = [Sampling(temperature=1.5, seed=seed) for seed in range(4)]
    alone = kangaroo.submit(ASKED, max_new_tokens=60).result(60)
    formed = kangaroo.submit(ASKED, drawn[0], max_new_tokens=200, grammar=schema).result(60)
    plain = kangaroo.submit(ASKED, max_new_tokens=60)
    tickets = [kangaroo.submit(ASKED, sampling, max_new_tokens=200, grammar=schema) for sampling in drawn]
    texts = set()
    for ticket in tickets:
        answer = ticket.result(60)
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), SCHEMA)
        texts.add(answer.text)
    assert plain.result(60).ids == alone.ids and tickets[0].result().ids == formed.ids and len(texts) > 1


@pytest.mark.parametrize(
    "kind, text, form",
    [
        ("regex", r"[A-D]: (yes|no)\.", r"[A-D]: (yes|no)\."),
        ("choice", '["left", "right (B)", "向左"]', r"left|right \(B\)|向左"),
        ("json_object", "", r"\{.*"),
    ],
)
def test_expressions_and_choices(kangaroo, kind, text, form):
    sampling = Sampling(temperature=1.0, seed=4)
    answer = kangaroo.submit(ASKED, sampling, max_new_tokens=40, grammar=kangaroo.grammars.of(kind, text)).result(60)
    assert re.fullmatch(form, answer.text, re.S)


def test_chat_takes_a_form(kangaroo, media):
    form = kangaroo.grammars.of("choice", '["left", "right"]')
    answer, history = kangaroo.chat(video=str(media / "a.mp4"), query="Which way?", grammar=form)
    assert answer in ("left", "right") and history[-1]["text"] == answer


def test_an_answer_that_is_cut_says_so(kangaroo):
    grammar = kangaroo.grammars.of("regex", "(ab){20}")
    answer = kangaroo.submit(ASKED, max_new_tokens=5, grammar=grammar).result(60)
    assert answer.finish_reason == "length" and "ab" * 20 == answer.text + ("ab" * 20)[len(answer.text) :]


def test_a_grammar_that_is_too_hard_costs_its_own_request(kangaroo):
    hard = kangaroo.grammars.of("regex", "(a{1000}){1000}")
    plain = kangaroo.submit(ASKED, max_new_tokens=20)
    with pytest.raises(UserError, match="grammar cannot be followed"):
        kangaroo.submit(ASKED, max_new_tokens=20, grammar=hard).result(60)
    assert len(plain.result(60).ids) == 20 and kangaroo.stats()["slots_busy"] == 0


@pytest.mark.parametrize("vocabulary", [299, 300, 319, 320, 321])
def test_every_vocabulary_has_a_bit_for_each_token(media, vocabulary):
    grammars = Grammars(load_tokenizer(media / "tokenizer.model"), vocabulary)
    assert grammars.of("regex", "a").begin().after(None).result(10).shape == (words(vocabulary),)
    grammars.close()


@pytest.mark.parametrize(
    "kind, text, told",
    [
        ("regex", "(a", "unclosed"),
        ("regex", "(?=a)b", "look-around"),
        ("json_schema", '{"type": "colour"}', "colour"),
        ("json_schema", '{"not": {}}', "not"),
        ("json_schema", "[", "no JSON schema"),
        ("json_schema", '{"$ref": "https://example.com/x"}', "does not fetch"),
        ("json_schema", '{"items":' * 500 + "{}" + "}" * 500, "recursion"),
        ("regex", "a" * (LONGEST + 1), "characters"),
    ],
)
def test_what_is_no_grammar_is_told_in_a_line(grammars, kind, text, told):
    with pytest.raises(UserError, match=told) as error:
        grammars.of(kind, text)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named_with_its_extra(media, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(UserError, match=r"llguidance.*serve"):
        Grammars(load_tokenizer(media / "tokenizer.model"), 300).of("regex", "a")
