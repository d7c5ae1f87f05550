"""What the engine's tests ask of it, stand-ins for its media and tokenizer, and the plain forward as the judge."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kangaroo_jax.data.media.video import MediaRef
from kangaroo_jax.inference.memories import Chunk, Part
from kangaroo_jax.inference.requests import Answer, Request

PLAIN, V, D = 512, 400, 32  # tokens that the plain forward takes


class Seen:
    """Vision tokens that are made up of a medium's name, and come a few at a time."""

    def __init__(self, at_a_time: int = 1000) -> None:
        self.at_a_time = at_a_time
        self.watched: list[Seen.Watched] = []
        self.listener = lambda: None

    def watch(self, ref, namespace, owner):
        self.watched.append(self.Watched(ref))
        return self.watched[-1]

    def pump(self):
        late = [w for w in self.watched if w.ready < w.rows and w.error is None and not w.released]
        for w in late:
            w.ready = min(w.rows, w.ready + self.at_a_time)
        return bool(late)

    def stats(self):
        return {}

    def forget(self):
        self.watched.clear()

    def close(self):
        pass

    class Watched:
        usage: dict = {}
        times = (0.5,)

        def __init__(self, ref):
            self.rows, self.ready, self.error, self.released = len(ref.times), 0, None, False
            self.identity = ref.path.encode()
            self.content = vision_of(ref)

        def take(self, first, last):
            assert last <= self.ready
            return self.content[first:last]

        def release(self):
            self.released = True


def vision_of(ref: MediaRef) -> np.ndarray:
    return np.random.default_rng(list(ref.path.encode())).normal(size=(len(ref.times), D)).astype(np.float32) * 3


def request(
    seed: int, text: int, films=(), new: int = 12, before: Request | None = None, answer=(), **options
) -> Request:
    """A prompt of random text with films ((name, vision tokens), ...) in it, perhaps after another and its answer."""
    rng = np.random.default_rng(seed)
    media = tuple(MediaRef("video", name, (0.0,) * rows, None, ()) for name, rows in films)
    tokens, is_vision = [*rng.integers(11, V, 3)], [False] * 3
    for _, rows in films:
        tokens += [10] * rows + [*rng.integers(11, V, 2)]
        is_vision += [True] * rows + [False] * 2
    tokens += [*rng.integers(11, V, text)]
    is_vision += [False] * text
    if before is not None:
        tokens = [*before.tokens, *answer, *tokens]
        is_vision = [*before.is_vision, *[False] * len(answer), *is_vision]
        media = before.media + media
    return Request(np.array(tokens, np.int32), np.array(is_vision), media, new, **options)


@functools.partial(jax.jit, static_argnums=6)
def _logits(weights, graph, tokens, index, vision, length, rounded):
    model = nnx.merge(graph.value, weights)
    x = model.embed(tokens[None], index[None], vision[None])
    if rounded:
        heads, width = model.llm.kv_heads, model.llm.head_dim
        nothing = Part.shapes(heads, width, PLAIN, jnp.int8, lambda shape, _, dtype: jnp.zeros(shape, dtype))
        whole = [Chunk(nothing, jnp.int32(0), visible=0)] * model.llm.depth
        return model.unstack().llm.unembed(model.llm.read(x, jnp.arange(PLAIN)[None], whole)[0])[0]
    segments = (jnp.arange(PLAIN) < length).astype(jnp.int32)[None]
    return model.llm.unembed(model.llm(x, segments, jnp.arange(PLAIN)[None])[0])


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Graph:
    value: nnx.GraphDef


def logits_after(model, asked: Request, answer, rounded=False) -> np.ndarray:
    """float32[n, V] of the plain forward: what it says after the prompt and each token of the answer.

    With `rounded`, of one with int8 keys and values, at once.
    """
    graph, weights = nnx.split(model)
    ids = np.concatenate([asked.tokens, np.asarray(answer, np.int32)])
    tokens, index = np.zeros(PLAIN, np.int32), np.full(PLAIN, -1, np.int32)
    tokens[: len(ids)] = ids
    index[: len(asked.tokens)] = np.where(asked.is_vision, np.cumsum(asked.is_vision) - 1, -1)
    vision = np.zeros((PLAIN, D), np.float32)
    rows = [vision_of(ref) for ref in asked.media]
    if rows:
        vision[: sum(map(len, rows))] = np.concatenate(rows)
    found = np.asarray(_logits(weights, Graph(graph), tokens, index, vision, len(ids), rounded))
    return found[len(asked.tokens) - 1 : len(ids) - 1 + (not len(answer))]


def assert_plain(model, asked: Request, answer: Answer, rounded=False) -> None:
    """The answer is the greedy one of the plain forward; of two tokens that are equally likely either."""
    assert len(answer.ids) == asked.max_new_tokens and answer.finish_reason == "length"
    logits = logits_after(model, asked, answer.ids, rounded)
    chosen = logits[np.arange(len(answer.ids)), answer.ids]
    np.testing.assert_allclose(chosen, logits.max(-1), atol=1e-4)


class Letters:
    """A detokenizer of one letter a token, which stops at any of `stop`."""

    def __init__(self, stop):
        self.stop, self.stopped, self.before = stop, False, ""

    def follow(self, ids):
        self.before = f"[{ids[-1]}]"

    def add(self, ids):
        self.stopped = any(chr(i) in self.stop for i in ids)
        return "" if self.stopped else "".join(map(chr, ids))

    def finish(self):
        return f"{self.before}."
