"""Which token comes next: the likeliest, or one drawn at a temperature from the likeliest few."""

import dataclasses

import jax
import jax.numpy as jnp

from kangaroo_jax.errors import UserError

GREEDY_BELOW = 1e-4  # a temperature that is as good as 0


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose. The same seed and prompt give the same answer.

    Raises UserError for a negative temperature or seed, or a `top_p` outside (0, 1].
    """

    temperature: float = 0.0  # 0 always takes the likeliest token
    top_p: float = 1.0  # draw among the likeliest tokens that have this probability together
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature}: must be 0 (always the likeliest token) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p {self.top_p}: must be above 0 and at most 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed {self.seed}: must be between 0 and 2^32 - 1")


def sample(logits: jax.Array, keys: jax.Array, temperature: jax.Array | float, top_p: jax.Array | float) -> jax.Array:
    """One token for each row.

    logits float32[B, V], keys: B typed random keys, temperature and top_p scalars (which may be traced)
    -> int32[B]. Draws from softmax(logits / temperature) cut to its nucleus, see `nucleus`; with a
    temperature of 0 it takes the largest logit, of equal ones the first.
    """

    def draw() -> jax.Array:
        scaled = logits / jnp.maximum(temperature, GREEDY_BELOW)
        ordered, order = nucleus(scaled, top_p)
        choice = jax.vmap(jax.random.categorical)(keys, ordered)
        return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)

    def likeliest() -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    tokens: jax.Array = jax.lax.cond(jnp.asarray(temperature) < GREEDY_BELOW, likeliest, draw)
    return tokens


def nucleus(logits: jax.Array, top_p: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """The smallest set of likeliest tokens whose probability reaches `top_p` (Holtzman et al. 2020).

    logits float32[B, V] -> (logits from largest to smallest with -inf outside the set, the tokens that they
    belong to int32[B, V]). The likeliest token is always in the set, and so is the one that crosses `top_p`.
    """
    order = jnp.argsort(-logits, axis=-1)  # stable: of equal logits the first token comes first
    ordered = jnp.take_along_axis(logits, order, axis=-1)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < top_p).at[:, 0].set(True)
    return jnp.where(kept, ordered, -jnp.inf), order
