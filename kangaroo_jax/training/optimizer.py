"""AdamW, Adafactor or Muon, with learning rates set for groups of parameters by a list of (regex, multiplier)."""

import math
import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from kangaroo_jax.config import OptimizerConfig
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.parameters import Params, multiplier
from kangaroo_jax.training.guard import guarded

KINDS = ("adamw", "adafactor", "muon")
MOMENT_DTYPES = ("float32", "bfloat16")
MUON_RMS = 0.2  # root mean square of an update, matched to AdamW's usual one (Liu et al. 2025, section 2.2)
# Biases, norms and position embeddings have no weight decay (the usual rule; inferred for Kangaroo).
NO_DECAY = re.compile(r".*(bias|scale|norm|position_embedding|cls_token|special_embedding).*")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to `learning_rate`, then cosine to `final_fraction` of it at the last of `steps`."""
    warmup = max(1, math.ceil(config.warmup_fraction * steps))
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / warmup,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=config.learning_rate * config.final_fraction,
    )


def decayed(paths: Iterable[str]) -> dict[str, bool]:
    """path -> whether weight decay applies to the parameter."""
    return {path: not NO_DECAY.fullmatch(path) for path in paths}


def make_optimizer(config: OptimizerConfig, steps: int, params: Params) -> optax.GradientTransformation:
    """Clip by the global norm, Adam (or another kind), decoupled weight decay, then each parameter's own rate.

    What `guard` does stands around all of it.

    Args:
        config: `config.optimizer`.
        steps: length of the schedule.
        params: the trainable parameters; every one must match a rule of `config.trainable`.

    Raises UserError for an unknown `config.kind` or `config.moment_dtype`.
    """
    rates = {path: multiplier(path, config.trainable) or 0.0 for path in params}

    def scale_each(
        updates: Params, state: optax.OptState, params: Params | None = None
    ) -> tuple[Params, optax.OptState]:
        del params
        return {path: update * rates[path] for path, update in updates.items()}, state

    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm or math.inf),
        scale_by_moments(config, params),
        optax.add_decayed_weights(config.weight_decay, mask=decayed(params)),
        optax.GradientTransformation(lambda _: optax.EmptyState(), scale_each),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )
    return guarded(chain, config)


def scale_by_moments(config: OptimizerConfig, params: Params) -> optax.GradientTransformation:
    """The transformation of a gradient into a step of about unit size, by `config.kind`.

    Kinds are adamw; adafactor (Shazeer and Stern 2018); muon (Jordan et al. 2024) for the matrices in the layers of
    `params` and in the projector, scaled to suit AdamW's rates (Liu et al. 2025), with Adam for the rest.
    """
    if config.moment_dtype not in MOMENT_DTYPES:
        raise UserError(f"optimizer.moment_dtype {config.moment_dtype!r}: one of {', '.join(MOMENT_DTYPES)}")
    if config.kind == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    if config.kind not in KINDS:
        raise UserError(f"optimizer.kind {config.kind!r}: one of {', '.join(KINDS)}")
    adam = scale_by_adam(config)
    if config.kind == "muon":
        return scale_by_muon({path: axes for path, x in params.items() if (axes := matrix_axes(path, x.ndim))}, adam)
    return adam


def scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam with moments stored in `config.moment_dtype` and computed in float32."""
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    if config.moment_dtype == "float32":
        return adam

    def cast(state: optax.ScaleByAdamState, dtype: str) -> optax.ScaleByAdamState:
        mu, nu = (jax.tree.map(lambda x: x.astype(dtype), moments) for moments in (state.mu, state.nu))
        return state._replace(mu=mu, nu=nu)

    def init(params: Params) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, config.moment_dtype), params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu=zeros, nu=dict(zeros))

    def update(
        updates: Params, state: optax.ScaleByAdamState, params: Params | None = None
    ) -> tuple[Params, optax.ScaleByAdamState]:
        updates, state = adam.update(updates, cast(state, "float32"), params)
        return updates, cast(state, config.moment_dtype)

    return optax.GradientTransformation(init, update)


def matrix_axes(path: str, ndim: int) -> contrib.MuonDimensionNumbers | None:
    """The input and output axes of a weight's matrix; None if it is no matrix inside the network.

    Layers are stacked along axis 0.
    """
    if path.startswith("projector/") and path.endswith("/kernel"):
        return contrib.MuonDimensionNumbers((0,), (1,))
    if not re.fullmatch(r".*/(layers|blocks)/.*/kernel", path):
        return None
    inputs = ndim - 2 if path.endswith("/out/kernel") else 1  # only `out` has heads among its inputs
    return contrib.MuonDimensionNumbers(tuple(range(1, 1 + inputs)), tuple(range(1 + inputs, ndim)))


def scale_by_muon(
    matrices: dict[str, contrib.MuonDimensionNumbers], others: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Orthogonal steps for `matrices` (path -> axes), of Adam's average size; `others` for the rest.

    Raises ValueError if a matrix has no parameter.
    """
    muon = contrib.scale_by_muon(weight_dimension_numbers=matrices)

    def split(values: Params) -> tuple[Params, Params]:
        return {path: values[path] for path in matrices}, {k: x for k, x in values.items() if k not in matrices}

    def scaled(path: str, update: jax.Array) -> jax.Array:
        """An orthogonal matrix of n rows and m columns has a root mean square of 1 / sqrt(max(n, m))."""
        sides = (math.prod(update.shape[axis] for axis in axes) for axes in matrices[path])
        return update * (MUON_RMS * math.sqrt(max(sides)))

    def init(params: Params) -> tuple[optax.OptState, optax.OptState]:
        inside, outside = split(params)
        return muon.init(inside), others.init(outside)

    def update(
        updates: Params, state: tuple[optax.OptState, optax.OptState], params: Params | None = None
    ) -> tuple[Params, tuple[optax.OptState, optax.OptState]]:
        del params
        inside, outside = split(updates)
        inside, first = muon.update(inside, state[0])
        outside, second = others.update(outside, state[1])
        return {path: scaled(path, x) for path, x in inside.items()} | outside, (first, second)

    return optax.GradientTransformation(init, update)


def count(params: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> int:
    """Number of parameters."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))
