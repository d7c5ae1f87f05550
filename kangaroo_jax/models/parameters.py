"""A model's parameters as a flat dictionary: readable in checkpoints, matched by regexes, named in errors."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kangaroo_jax.config import ModelConfig
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.kangaroo import KangarooModel

Params = dict[str, jax.Array]  # "llm/layers/attention/q/kernel" -> array


class Binding:
    """How to put a flat dictionary of parameters back into the model it came from.

    Attributes:
        axes: path -> logical axis names of that parameter (see `sharding.RULES`).
        shapes: path -> shape and dtype.
    """

    def __init__(self, model: nnx.Module) -> None:
        """Takes the structure of `model` (which may be abstract, from `nnx.eval_shape`), not its values."""
        self._graphdef, state = nnx.split(model)
        flat = nnx.to_flat_state(state)
        self._paths = ["/".join(map(str, path)) for path, _ in flat]
        leaves, self._treedef = jax.tree.flatten(state)
        by_path = {path: leaf for path, leaf in zip(self._paths, leaves, strict=True)}
        self.axes = {
            path: tuple(variable.get_metadata().get("axes") or (None,) * by_path[path].ndim)
            for path, (_, variable) in zip(self._paths, flat, strict=True)
        }
        self.shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in by_path.items()}

    def flatten(self, model: nnx.Module) -> Params:
        """The parameters of a model of this structure, by path."""
        return dict(zip(self._paths, jax.tree.leaves(nnx.split(model)[1]), strict=True))

    def bind(self, params: Mapping[str, jax.Array]) -> Any:
        """The model that holds `params`; cheap, meant to be called while a pure function is traced."""
        leaves = [params[path] for path in self._paths]
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))


def multiplier(path: str, rules: Sequence[tuple[str, float | None]]) -> float | None:
    """The learning-rate multiplier that the first matching rule gives to `path`; None is frozen.

    Raises UserError where no rule matches: a forgotten parameter is never frozen in silence.
    """
    for pattern, value in rules:
        if re.fullmatch(pattern, path):
            return value
    raise UserError(
        f"no rule of config.optimizer.trainable matches the parameter {path}: end the list with ('.*', None)"
    )


def split_trainable(
    params: Params, rules: Sequence[tuple[str, float | None]], frozen_dtype: str
) -> tuple[Params, Params]:
    """(trainable in float32, frozen in `frozen_dtype`) by the list of (regex, multiplier)."""
    trainable = {k: v.astype(jnp.float32) for k, v in params.items() if multiplier(k, rules) is not None}
    frozen = {k: v.astype(frozen_dtype) for k, v in params.items() if k not in trainable}
    return trainable, frozen


def abstract_model(config: ModelConfig) -> Binding:
    """The structure of a model, with nothing allocated."""
    return Binding(nnx.eval_shape(lambda: KangarooModel(config, rngs=nnx.Rngs(0))))
