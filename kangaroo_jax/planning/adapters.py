"""What an adapter and a quantised base take on a device, by their shapes."""

import functools
import math

from kangaroo_jax.config import LoraConfig, ModelConfig
from kangaroo_jax.models.lora import is_factor
from kangaroo_jax.models.parameters import abstract_model


@functools.lru_cache(maxsize=64)
def adapted_sizes(model: ModelConfig, lora: LoraConfig) -> tuple[int, float]:
    """(parameters of the factors, bytes of the frozen base, in bfloat16 where it is not quantised)."""
    factors, frozen = 0, 0.0
    for path, x in abstract_model(model, lora).shapes.items():
        if is_factor(path):
            factors += math.prod(x.shape)
        else:
            frozen += math.prod(x.shape) * (4.0 if path.endswith("_scale") else min(2.0, x.dtype.itemsize))
    return factors, frozen
