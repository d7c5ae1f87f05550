"""Answers of a given form: a JSON schema, a regular expression or a choice becomes what the next token may be.

Grammars are llguidance's (github.com/guidance-ai/llguidance), which knows nothing of the model. Its work for a token is
done beside the engine's thread: an answer with a grammar misses the steps until it is done, and the others do not wait.
"""

import dataclasses
import functools
import json
import re
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import UInt32

from kangaroo_jax.data.tokenizer import Tokenizer
from kangaroo_jax.errors import UserError, one_line
from kangaroo_jax.inference.sampling import words
from kangaroo_jax.system.installing import install_line

KINDS = ("json_object", "json_schema", "regex", "choice")
LONGEST = 1 << 16  # characters of a grammar
_KEPT = 64  # grammars that stay compiled
_THREADS = 2
# One line and a space behind commas and colons: a small model would go on with spaces for ever.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Bounds of the work for one token and for the first: at most some tenths of a second, for expressions made to be slow.
_LIMITS = {"initial_lexer_fuel": 200_000, "step_lexer_fuel": 50_000, "max_lexer_states": 50_000}


class Guide:
    """How far an answer has come in its grammar. For one thread at a time."""

    def __init__(self, matcher: Any, words: int, pool: ThreadPoolExecutor) -> None:
        self._matcher, self._words, self._pool = matcher, words, pool

    def after(self, token: int | None) -> Future[np.ndarray | None]:
        """What may come after the last token of the answer, None before the first: uint32[W] with a bit for each token.

        It is None where nothing can follow; its exception is a UserError where the grammar is too hard to follow.
        """
        return self._pool.submit(self._after, token)

    def _after(self, token: int | None) -> UInt32[np.ndarray, " W"] | None:
        if token is not None:
            self._matcher.consume_token(token)
        allowed = None
        if not self._matcher.is_stopped():
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
            allowed = bits[: self._words]  # it has room for one token more
        if self._matcher.is_error():
            told = one_line(self._matcher.get_error().split("<state>")[0])[:160]
            raise UserError(f"the answer's grammar cannot be followed any further: {told}")
        return allowed


@dataclasses.dataclass(frozen=True, eq=False)
class Grammar:
    """A form of answers, compiled."""

    _matcher: Any
    _words: int
    _pool: ThreadPoolExecutor

    def begin(self) -> Guide:
        """Follow it from its beginning."""
        return Guide(self._matcher.deep_copy(), self._words, self._pool)


class Grammars:
    """Makes grammars for the answers of one model. Every method may be called from any thread."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        """`vocabulary`: tokens that the model knows, those without a text included. Nothing is made yet."""
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar")
        self._compiled = functools.lru_cache(_KEPT)(self._compile)

    def close(self) -> None:
        """End its threads."""
        self._pool.shutdown(cancel_futures=True)

    def of(self, kind: str, text: str) -> Grammar:
        """The grammar of one of KINDS.

        `text`: a JSON schema, a regular expression, a JSON list of texts to choose from; of `json_object` it is empty.

        Raises:
            UserError: it is too long, is none, or asks for what is not known here; or llguidance is not installed.
        """
        if len(text) > LONGEST:
            raise UserError(f"a grammar of {len(text)} characters, and it may have {LONGEST}")
        with self._lock:
            return self._compiled(kind, text)

    def _compile(self, kind: str, text: str) -> Grammar:
        library = _library()
        source = _source(library.LLMatcher, kind, text)
        matcher = library.LLMatcher(self._known, source, log_level=0, limits=library.LLParserLimits(**_LIMITS))
        if matcher.is_error():
            raise UserError(one_line(matcher.get_error().split("<state>")[0])[:300])
        for told in matcher.get_grammar_warnings():
            raise UserError(one_line(told)[:300])
        return Grammar(matcher, words(self._vocabulary), self._pool)

    @functools.cached_property
    def _known(self) -> Any:
        """The tokenizer, as llguidance reads it."""
        library = _library()
        reader = _Reader(self._tokenizer, self._vocabulary)
        stops = [token for token in self._tokenizer.stop_ids if token < self._vocabulary]
        return library.LLTokenizer(library.TokenizerWrapper(reader), n_vocab=self._vocabulary, eos_token=stops)


class _Reader:
    """A tokenizer with the names that llguidance asks for."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        self._encode = tokenizer.encode
        self.eos_token_id, self.bos_token_id = tokenizer.eos, tokenizer.bos
        self.tokens = [tokenizer.bytes_of(token) for token in range(vocabulary)]
        self.special_token_ids = [token for token, text in enumerate(self.tokens) if not text]

    def __call__(self, text: bytes) -> Sequence[int]:
        return self._encode(text.decode(errors="replace"))


def _source(matcher: Any, kind: str, text: str) -> str:
    """A grammar in llguidance's own language."""
    if kind == "regex":
        source: str = matcher.grammar_from_regex(text)
    elif kind == "choice":
        source = matcher.grammar_from_regex("|".join(re.escape(choice) for choice in json.loads(text)))
    elif kind in ("json_object", "json_schema"):
        schema = '{"type": "object"}' if kind == "json_object" else text
        try:
            source = matcher.grammar_from_json_schema(schema, overrides=_JSON)
        except ValueError as error:
            raise UserError(f"no JSON schema: {one_line(error)[:300]}") from None
    else:
        raise ValueError(f"{kind!r} is none of {KINDS}")
    return source


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UserError(f"answers of a given form need llguidance: {install_line('serve')}") from None
    return llguidance
