"""Which token comes next: the likeliest, or one drawn at a temperature from the likeliest few."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt32

from kangaroo_jax.conventions import AnyArray, Array
from kangaroo_jax.errors import UserError

GREEDY_BELOW = 1e-4  # a temperature that is as good as 0
MOST_BIASES = 300  # tokens whose logits a request may change
MOST_LOGPROBS = 20  # likeliest tokens whose log-probabilities can be asked for
_IN_PROMPT = 1 << 24  # flag in what a row has seen; below it, how often a token stands in the answer


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose. The same seed and prompt give the same answer.

    Raises UserError for a value that is out of range.
    """

    temperature: float = 0.0  # 0 always takes the likeliest token
    top_p: float = 1.0  # draw among the likeliest tokens that have this probability together
    seed: int = 0
    top_k: int = 0  # draw among so many likeliest tokens; 0 is all
    min_p: float = 0.0  # draw among tokens of at least this share of the largest probability
    presence: float = 0.0  # what the logit of a token that stands in the answer loses
    frequency: float = 0.0  # and for each time that it does
    repetition: float = 1.0  # what divides the logit of a token of the prompt or answer; above 1 there are fewer
    bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature}: must be 0 (always the likeliest token) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p {self.top_p}: must be above 0 and at most 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed {self.seed}: must be between 0 and 2^32 - 1")
        if not 0 <= self.top_k < 2**31:
            raise UserError(f"top_k {self.top_k}: must be 0 (all tokens) or more")
        if not 0.0 <= self.min_p <= 1.0:
            raise UserError(f"min_p {self.min_p}: must be between 0 and 1")
        for name in ("presence", "frequency"):
            if not -100.0 <= getattr(self, name) <= 100.0:
                raise UserError(f"{name} {getattr(self, name)}: must be between -100 and 100")
        if not 0.0 < self.repetition <= 100.0:
            raise UserError(f"repetition {self.repetition}: must be above 0 (1 changes nothing) and at most 100")
        if len(self.bias) > MOST_BIASES or not all(-100.0 <= value <= 100.0 for _, value in self.bias):
            raise UserError(f"bias: at most {MOST_BIASES} tokens, each with a value between -100 and 100")

    @property
    def penalises(self) -> bool:
        """Whether what was said before changes what comes next."""
        return (self.presence, self.frequency, self.repetition) != (0.0, 0.0, 1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choices:
    """The `Sampling` of each of B rows as arrays, so that no value of them means another program."""

    temperature: AnyArray  # float32[B], as are the next five
    top_p: AnyArray
    min_p: AnyArray
    presence: AnyArray
    frequency: AnyArray
    repetition: AnyArray
    top_k: AnyArray  # int32[B]; 0 is all
    seed: AnyArray  # uint32[B]
    bias_ids: AnyArray  # int32[B, MOST_BIASES]; V where there is none
    biases: AnyArray  # float32[B, MOST_BIASES]
    wants_logprobs: AnyArray  # bool[B]
    guided: AnyArray  # bool[B]; whether a grammar says what may come

    @classmethod
    def of(
        cls, rows: Sequence[Sampling], wants_logprobs: Sequence[bool], guided: Sequence[bool], vocabulary: int
    ) -> "Choices":
        """The settings of rows; `vocabulary` is V."""
        ids = np.full((len(rows), MOST_BIASES), vocabulary, np.int32)
        biases = np.zeros((len(rows), MOST_BIASES), np.float32)
        for row, sampling in enumerate(rows):
            for place, (token, bias) in enumerate(sampling.bias):
                ids[row, place], biases[row, place] = token, bias
        floats = {
            name: np.array([getattr(sampling, name) for sampling in rows], np.float32)
            for name in ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")
        }
        return cls(
            **floats,
            top_k=np.array([sampling.top_k for sampling in rows], np.int32),
            seed=np.array([sampling.seed for sampling in rows], np.uint32),
            bias_ids=ids,
            biases=biases,
            wants_logprobs=np.array(wants_logprobs, np.bool_),
            guided=np.array(guided, np.bool_),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
    """The next token of each row; its log-probability, and the likeliest tokens with theirs, where a row wants them.

    Log-probabilities are the model's own, before bias, penalties and temperature.
    """

    tokens: AnyArray  # int32[B]
    logprobs: AnyArray  # float32[B]
    best: AnyArray  # int32[B, MOST_LOGPROBS or V]
    best_logprobs: AnyArray  # float32[B, the same]


def seen_in_prompt(tokens: np.ndarray, vocabulary: int) -> Int32[np.ndarray, " V"]:
    """What a row has seen before its answer begins, for `choose`."""
    seen = np.zeros(vocabulary, np.int32)
    seen[tokens] = _IN_PROMPT
    return seen


def words(vocabulary: int) -> int:
    """W: words of 32 bits that have a bit for each token."""
    return -(-vocabulary // 32)


def choose(
    logits: Float32[Array, "B V"],
    seen: Sequence[Int32[Array, " V"]],
    index: Int32[Array, " B"],
    choices: Choices,
    allowed: UInt32[Array, "B W"],
) -> Chosen:
    """The next token of each row, by its own settings alone.

    `seen`: for each row what `seen_in_prompt` gave, and one more for each token of the answer. `index`: the place of
    the token in the answer; the random key is of the seed and this alone. `allowed`: a bit for each token, the lowest
    first, 1 where it may come; of rows that are `guided`.
    """

    def of_grammars(logits: Float32[Array, "B V"]) -> Float32[Array, "B V"]:
        token = np.arange(logits.shape[1])
        bits = (allowed[:, token // 32] >> (token % 32).astype(np.uint32)) & 1
        masked: jax.Array = jnp.where((bits == 1) | ~choices.guided[:, None], logits, -jnp.inf)
        return masked

    changed = penalised(logits, seen, choices)
    changed = jax.lax.cond(jnp.any(choices.guided), of_grammars, lambda logits: logits, changed)
    greedy = choices.temperature < GREEDY_BELOW
    likeliest = jnp.argmax(changed, axis=-1).astype(jnp.int32)

    def draw() -> Int32[Array, " B"]:
        scaled = changed / jnp.maximum(choices.temperature, GREEDY_BELOW)[:, None]
        keys = jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed), index))(choices.seed, index)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, scaled.shape[1:], jnp.float32))(keys)
        drawn = jnp.argmax(jnp.where(kept(scaled, choices), scaled + noise, -jnp.inf), axis=-1)
        return jnp.where(greedy, likeliest, drawn.astype(jnp.int32))

    tokens = jax.lax.cond(jnp.all(greedy), lambda: likeliest, draw)
    count = min(MOST_LOGPROBS, logits.shape[1])

    def log_probabilities() -> tuple[Float32[Array, " B"], Int32[Array, "B best"], Float32[Array, "B best"]]:
        total = jax.nn.logsumexp(logits, axis=-1)
        best, ids = jax.lax.top_k(logits, count)
        own = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
        return own - total, ids.astype(jnp.int32), best - total[:, None]

    def none() -> tuple[Float32[Array, " B"], Int32[Array, "B best"], Float32[Array, "B best"]]:
        rows = logits.shape[0]
        return jnp.zeros(rows), jnp.zeros((rows, count), jnp.int32), jnp.zeros((rows, count))

    return Chosen(tokens, *jax.lax.cond(jnp.any(choices.wants_logprobs), log_probabilities, none))


def penalised(
    logits: Float32[Array, "B V"], seen: Sequence[Int32[Array, " V"]], choices: Choices
) -> Float32[Array, "B V"]:
    """Logits with each row's biases, then its penalties for tokens that it has seen.

    A token of the prompt or answer has its logit divided by `repetition` where it is positive, multiplied where it
    is not (Keskar et al. 2019); one of the answer loses `presence`, and `frequency` for each time.
    """

    def biased() -> Float32[Array, "B V"]:
        rows = jnp.arange(logits.shape[0])[:, None]
        return logits.at[rows, choices.bias_ids].add(choices.biases, mode="drop")

    def with_penalties(logits: Float32[Array, "B V"]) -> Float32[Array, "B V"]:
        counts = jnp.stack(seen)
        factor = jnp.where(counts > 0, choices.repetition[:, None], 1.0)
        times = (counts & (_IN_PROMPT - 1)).astype(jnp.float32)
        logits = jnp.where(logits > 0, logits / factor, logits * factor)
        less: jax.Array = choices.frequency[:, None] * times + choices.presence[:, None] * (times > 0)
        return logits - less

    with_bias = jax.lax.cond(jnp.any(choices.biases != 0), biased, lambda: logits)
    wanted = (choices.presence != 0) | (choices.frequency != 0) | (choices.repetition != 1)
    result: jax.Array = jax.lax.cond(jnp.any(wanted), with_penalties, lambda logits: logits, with_bias)
    return result


def kept(logits: Float32[Array, "B V"], choices: Choices) -> Bool[Array, "B V"]:
    """Which tokens may be drawn from logits, which the temperature has divided.

    The `top_k` likeliest; of these the fewest likeliest that have `top_p` of their probability together (Holtzman et
    al. 2020); and those of at least `min_p` of the largest probability (Nguyen et al. 2024). Equal logits are kept
    or not together. The vocabulary is not sorted: what is kept is all above a threshold, which is found by bisection.
    """
    keys = _ordered(logits)
    lowest = jnp.full(logits.shape[:1], np.iinfo(np.int32).min, jnp.int32)

    def k_th() -> Int32[Array, " B"]:
        limit = jnp.where(choices.top_k > 0, choices.top_k, logits.shape[1])
        return _smallest(lambda t: jnp.sum(keys > t[:, None], axis=-1) < limit, keys)

    lowest = jax.lax.cond(jnp.any(choices.top_k > 0), k_th, lambda: lowest)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.where(keys >= lowest[:, None], jnp.exp(logits - largest), 0.0)

    def nucleus_edge() -> Int32[Array, " B"]:
        limit = choices.top_p * jnp.sum(weights, axis=-1)
        edge = _smallest(lambda t: jnp.sum(jnp.where(keys > t[:, None], weights, 0.0), axis=-1) < limit, keys)
        return jnp.where(choices.top_p < 1.0, jnp.maximum(edge, lowest), lowest)

    lowest = jax.lax.cond(jnp.any(choices.top_p < 1.0), nucleus_edge, lambda: lowest)
    result: jax.Array = (keys >= lowest[:, None]) & (weights >= choices.min_p[:, None])
    return result


def _ordered(x: Float32[Array, "B V"]) -> Int32[Array, "B V"]:
    """Whole numbers that are ordered as x is."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0.0, 0.0, x), jnp.int32)  # of both zeros
    ordered: jax.Array = bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))
    return ordered


def _smallest(
    holds: Callable[[Int32[Array, " B"]], Bool[Array, " B"]], keys: Int32[Array, "B V"]
) -> Int32[Array, " B"]:
    """The smallest number of each row that `holds`, as the largest of the row of `keys` does and all beyond it do."""
    Bounds = tuple[Int32[Array, " B"], Int32[Array, " B"]]

    def halve(_: Int32[Array, ""], bounds: Bounds) -> Bounds:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)
        fits = holds(middle)
        return jnp.where(fits, low, middle + 1), jnp.where(fits, middle, high)

    bounds = jax.lax.fori_loop(0, 32, halve, (jnp.min(keys, axis=-1), jnp.max(keys, axis=-1)))
    smallest: jax.Array = bounds[1]
    return smallest
