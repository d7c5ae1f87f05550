"""Cross-entropy over a large vocabulary without ever holding all the logits."""

import jax
import jax.numpy as jnp


def chunked_cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, *, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Weighted next-token cross-entropy -> (sum of weight * loss, sum of weights), float32 scalars.

    hidden [B, T, D] after the final norm, head [D, V], targets int32[B, T], weights float32[B, T].
    Logits exist for `chunk` tokens of a pack at a time, forward and backward.
    """
    batch, length, width = hidden.shape
    chunk = min(chunk, length)
    padding = -length % chunk
    parts = -(-length // chunk)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, parts, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def step(total: jax.Array, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        hidden, targets, weights = part
        logits = jnp.einsum("btd,dv->btv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
        true = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return total + jnp.sum((jax.nn.logsumexp(logits, axis=-1) - true) * weights), None

    total, _ = jax.lax.scan(step, jnp.zeros((), jnp.float32), (split(hidden), split(targets), split(weights)))
    return total, jnp.sum(weights, dtype=jnp.float32)
