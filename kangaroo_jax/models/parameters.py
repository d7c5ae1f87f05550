"""A model's parameters as a flat dictionary: readable in checkpoints, matched by regexes, named in errors."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kangaroo_jax.config import LoraConfig, ModelConfig
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.lora import abstract_adapted
from kangaroo_jax.models.quantized import EMBEDDING_SCALE, SCALE

NO_FACTORS = LoraConfig()
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
    """(trainable in float32, frozen in `frozen_dtype`) by the list of (regex, multiplier).

    Frozen weights that are quantised stay so, and their scales float32.
    """
    trainable = {k: v.astype(jnp.float32) for k, v in params.items() if multiplier(k, rules) is not None}
    frozen = {k: v if _is_quantized(k, v) else v.astype(frozen_dtype) for k, v in params.items() if k not in trainable}
    return trainable, frozen


def _is_quantized(path: str, x: Any) -> bool:
    """Whether a parameter is a quantised kernel or embedding, or its scale."""
    return path.endswith((f"/{SCALE}", f"/{EMBEDDING_SCALE}")) or bool(jnp.issubdtype(x.dtype, jnp.integer))


def abstract_model(config: ModelConfig, lora: LoraConfig = NO_FACTORS) -> Binding:
    """The structure of a model with the factors of `lora`, with nothing allocated. Raises UserError.

    A decoder that `lora` says is quantised is so.
    """
    return Binding(abstract_adapted(config, lora))
