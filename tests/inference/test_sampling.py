"""Rows that choose by settings of their own, against plain formulas in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax.errors import UserError
from kangaroo_jax.inference import sampling
from kangaroo_jax.inference.sampling import Choices, Sampling, seen_in_prompt, words

V = 60
choose, kept, penalised = jax.jit(sampling.choose), jax.jit(sampling.kept), jax.jit(sampling.penalised)

SETTINGS = [
    Sampling(),
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.7, top_p=0.8, seed=1),
    Sampling(temperature=1.3, top_k=5),
    Sampling(temperature=1.0, min_p=0.2, seed=9),
    Sampling(temperature=2.0, top_k=12, top_p=0.6, min_p=0.01),
    Sampling(temperature=0.5, presence=0.7, frequency=0.4, repetition=1.3, bias=((3, 2.5), (7, -50.0))),
    Sampling(top_p=0.01, repetition=0.8, frequency=-0.5),
]


def choices(rows=SETTINGS, wants=False) -> Choices:
    return Choices.of(rows, [wants] * len(rows), [False] * len(rows), V)


def anything(rows):
    """No grammar says what may come."""
    return jnp.zeros((rows, words(V)), jnp.uint32)


def logits_of(seed: int, rows: int = len(SETTINGS)) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, V)) * 3).astype(np.float32)


def plain_kept(logits: np.ndarray, s: Sampling) -> set[int]:
    """Tokens that may be drawn, by sorting."""
    order = sorted(range(V), key=lambda i: -logits[i])
    if s.top_k:
        order = order[: s.top_k]
    p = np.exp(logits[order].astype(np.float64) - logits.max())
    p /= p.sum()
    before = np.cumsum(p) - p
    return {
        token for token, share, mass in zip(order, p, before, strict=True) if mass < s.top_p and share >= s.min_p * p[0]
    }


@pytest.mark.parametrize("seed", range(5))
def test_what_may_be_drawn_is_what_sorting_finds_for_each_row(seed):
    logits = logits_of(seed)
    found = np.asarray(kept(logits, choices()))
    for row, setting in enumerate(SETTINGS):
        assert set(np.flatnonzero(found[row])) == plain_kept(logits[row], setting), setting


def test_equal_logits_stay_together_and_zeros_of_both_signs_are_equal():
    logits = np.full((2, V), -5.0, np.float32)
    logits[:, [4, 9, 11]] = 1.0, 0.0, -0.0
    found = np.asarray(
        kept(logits, choices([Sampling(temperature=1.0, top_k=2), Sampling(temperature=1.0, top_p=0.75)]))
    )
    assert [np.flatnonzero(row).tolist() for row in found] == [[4, 9, 11], [4, 9, 11]]


def plain_penalised(logits, prompt, answer, s):
    logits = logits.astype(np.float64).copy()
    for token, bias in s.bias:
        logits[token] += bias
    for token in set(prompt) | set(answer):
        logits[token] = logits[token] / s.repetition if logits[token] > 0 else logits[token] * s.repetition
    for token in set(answer):
        logits[token] -= s.presence + s.frequency * list(answer).count(token)
    return logits


def test_penalties_count_the_prompt_and_the_answer():
    rng = np.random.default_rng(0)
    prompts, answers = [rng.integers(0, V, 9) for _ in SETTINGS], [rng.integers(0, 12, 7) for _ in SETTINGS]
    seen = []
    for prompt, answer in zip(prompts, answers, strict=True):
        row = seen_in_prompt(prompt, V)
        np.add.at(row, answer, 1)
        seen.append(jnp.asarray(row))
    logits = logits_of(7)
    found = np.asarray(penalised(logits, seen, choices()))
    for row, setting in enumerate(SETTINGS):
        want = plain_penalised(logits[row], prompts[row], answers[row], setting)
        np.testing.assert_allclose(found[row], want, rtol=1e-5, atol=1e-5)


def test_a_row_draws_the_same_alone_and_among_others_and_by_its_seed_and_place():
    logits, index = logits_of(1), np.arange(len(SETTINGS), dtype=np.int32) * 5
    seen = [jnp.zeros(V, jnp.int32)] * len(SETTINGS)
    together = np.asarray(choose(logits, seen, index, choices(), anything(len(logits))).tokens)
    order = np.random.default_rng(0).permutation(len(SETTINGS))
    turned = choose(logits[order], seen, index[order], choices([SETTINGS[i] for i in order]), anything(len(order)))
    np.testing.assert_array_equal(turned.tokens, together[order])
    for row, setting in enumerate(SETTINGS):
        alone = choose(logits[row : row + 1], seen[:1], index[row : row + 1], choices([setting]), anything(1))
        assert int(alone.tokens[0]) == together[row]
        key = jax.random.fold_in(jax.random.key(setting.seed), int(index[row]))
        allowed = np.full(V, -np.inf)
        changed = plain_penalised(logits[row], [], [], setting)
        scaled = changed / max(setting.temperature, sampling.GREEDY_BELOW)
        ids = sorted(plain_kept(scaled, setting))
        allowed[ids] = scaled[ids] + (
            np.asarray(jax.random.gumbel(key, (V,), jnp.float32))[ids] if setting.temperature else 0
        )
        assert together[row] == np.argmax(allowed)


def test_frequencies_are_those_of_the_softmax():
    count = 6000
    logits = jnp.log(jnp.array([[0.4, 0.05, 0.3, 0.2, 0.05]]))
    row = Choices.of([Sampling(temperature=2.0, top_p=0.75, seed=5)], [False], [False], 5)

    @jax.jit
    @jax.vmap
    def draw(index):
        return sampling.choose(
            logits, [jnp.zeros(5, jnp.int32)], index[None], row, jnp.zeros((1, 1), jnp.uint32)
        ).tokens[0]

    want = np.sqrt([0.4, 0.0, 0.3, 0.2, 0.0])
    found = np.bincount(np.asarray(draw(np.arange(count, dtype=np.int32))), minlength=5)
    np.testing.assert_allclose(found / count, want / want.sum(), atol=0.03)


def test_log_probabilities_are_the_models_own():
    logits = logits_of(3)
    seen = [jnp.zeros(V, jnp.int32)] * len(SETTINGS)
    chosen = choose(logits, seen, np.zeros(len(SETTINGS), np.int32), choices(wants=True), anything(len(SETTINGS)))
    plain = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    tokens = np.asarray(chosen.tokens)
    np.testing.assert_allclose(chosen.logprobs, plain[np.arange(len(tokens)), tokens], atol=1e-5)
    order = np.argsort(-logits, axis=-1, kind="stable")[:, : sampling.MOST_LOGPROBS]
    np.testing.assert_array_equal(chosen.best, order)
    np.testing.assert_allclose(chosen.best_logprobs, np.take_along_axis(plain, order, -1), atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
        {"top_k": -1},
        {"min_p": 1.5},
        {"presence": float("nan")},
        {"frequency": 1000.0},
        {"repetition": 0.0},
        {"bias": ((1, 101.0),)},
        {"bias": ((1, 0.0),) * 301},
    ],
)
def test_settings_out_of_range_are_one_line(change):
    with pytest.raises(UserError, match=next(iter(change))) as error:
        dataclasses.replace(Sampling(), **change)
    assert "\n" not in str(error.value)
