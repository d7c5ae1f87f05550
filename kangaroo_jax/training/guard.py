"""What stands around the optimiser if the config asks for it: spikes are passed over, and weights are averaged.

A spike is a gradient whose norm is more than `optimizer.spike_factor` times the median of the last `spike_window`
norms. The step then changes neither weights, nor the optimiser, nor their average. The norms are a part of the
optimiser's state: all devices decide alike, and a run that goes on decides as one that was left alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kangaroo_jax.config import OptimizerConfig
from kangaroo_jax.models.parameters import Params

LEAST_NORMS = 8  # until so many are known nothing is a spike


class Guarded(NamedTuple):
    """The state of an optimiser that is guarded."""

    inner: optax.OptState
    norms: jax.Array | None  # float32[spike_window], the latest last; -1 where none is known yet
    spikes: jax.Array | None  # int32[]; steps that were passed over
    updates: jax.Array | None  # int32[]; steps that are in the average
    ema: Params  # float32; {} where weights are not averaged


def guarded(inner: optax.GradientTransformation, config: OptimizerConfig) -> optax.GradientTransformation:
    """`inner` with what `config` asks for around it, and `inner` itself where it asks for nothing."""
    factor, decay = config.spike_factor, config.ema
    if not factor and not decay:
        return inner

    def init(params: Params) -> Guarded:
        zero = jnp.zeros((), jnp.int32)
        return Guarded(
            inner.init(params),
            jnp.full((config.spike_window,), -1.0, jnp.float32) if factor else None,
            zero if factor else None,
            zero if decay else None,
            {path: jnp.array(x, copy=True) for path, x in params.items()} if decay else {},
        )

    def step(grads: Params, state: Guarded, params: Params) -> tuple[Params, Guarded]:
        updates, after = inner.update(grads, state.inner, params)
        if state.updates is None:
            return updates, state._replace(inner=after)
        count = state.updates + 1
        keep = jnp.minimum(decay, (1 + count) / (10 + count))  # soon forgets the weights that a stage begins with
        new = optax.apply_updates(params, updates)
        ema = {path: keep * old + (1 - keep) * new[path] for path, old in state.ema.items()}
        return updates, state._replace(inner=after, updates=count, ema=ema)

    def passed(grads: Params, state: Guarded, params: Params) -> tuple[Params, Guarded]:
        del params
        assert state.spikes is not None
        return jax.tree.map(jnp.zeros_like, grads), state._replace(spikes=state.spikes + 1)

    def update(grads: Params, state: Guarded, params: Params) -> tuple[Params, Guarded]:
        if state.norms is None:
            return step(grads, state, params)
        norm, known = optax.tree.norm(grads), state.norms >= 0
        median = jnp.nanmedian(jnp.where(known, state.norms, jnp.nan))
        spike = (jnp.sum(known) >= LEAST_NORMS) & (norm > factor * median)
        updates, after = jax.lax.cond(spike, passed, step, grads, state, params)
        norms = jnp.where(jnp.isfinite(norm), jnp.append(state.norms[1:], norm), state.norms)
        return updates, after._replace(norms=norms)

    return optax.GradientTransformation(init, update)


def told(opt_state: Any) -> dict[str, jax.Array]:
    """What a step's metrics say of the guard: `spikes` so far, where they are passed over."""
    if not isinstance(opt_state, Guarded) or opt_state.spikes is None:
        return {}
    return {"spikes": opt_state.spikes.astype(jnp.float32)}


def without_ema(opt_state: Any) -> tuple[Any, Params]:
    """(the optimiser's state without the average of the weights, which a checkpoint keeps by itself, the average)."""
    if not isinstance(opt_state, Guarded):
        return opt_state, {}
    return opt_state._replace(ema={}), opt_state.ema


def with_ema(opt_state: Any, ema: Params) -> Any:
    """What `without_ema` was given."""
    return opt_state._replace(ema=ema) if isinstance(opt_state, Guarded) else opt_state
