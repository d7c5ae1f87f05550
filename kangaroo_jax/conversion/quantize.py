"""`kangaroo convert --quantize`: the decoder's linear maps as small whole numbers, each with its scale."""

from collections.abc import Mapping

import numpy as np

from kangaroo_jax.checkpoints.stored import Box, Spec, whole
from kangaroo_jax.config import ModelConfig
from kangaroo_jax.conversion.names import STACKED
from kangaroo_jax.conversion.weights import Weights
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.llama import contracted_of
from kangaroo_jax.models.parameters import abstract_model
from kangaroo_jax.models.quantized import DTYPES, FORMATS, KERNEL, SCALE, dequantize, quantize, shapes


class Quantized:
    """Weights whose kernels of the decoder are rounded, and the scales beside them; the rest as it is."""

    def __init__(self, weights: Weights, model: ModelConfig, form: str) -> None:
        """Raises UserError for a format that is none, or a width that cannot be packed."""
        if form not in FORMATS:
            raise UserError(f"--quantize={form}: use one of {', '.join(FORMATS)}")
        self._weights, self._form = weights, form
        self._contracted: Mapping[str, int] = contracted_of(model.llm)
        self.specs: dict[str, Spec] = {}
        for path, spec in weights.specs.items():
            self.specs[path] = spec
            if path in self._contracted:
                lead = spec.shape[: self._layers(path)]
                try:
                    kernel, scale = shapes(spec.shape[len(lead) :], self._contracted[path], form)
                except ValueError as error:
                    raise UserError(f"--quantize={form}: {path}: {error}") from None
                self.specs[path] = Spec((*lead, *kernel), np.dtype(DTYPES[form]))
                self.specs[_scale_of(path)] = Spec((*lead, *scale), np.dtype(np.float32))

    def read(self, path: str, box: Box) -> np.ndarray:
        """See `Weights`. Of a kernel that is cut, the outputs are."""
        kernel = path.removesuffix(SCALE) + KERNEL if path.endswith(f"/{SCALE}") else path
        if kernel not in self._contracted:
            return self._weights.read(path, box)
        lead, contracted = self._layers(kernel), self._contracted[kernel]
        inputs = whole(self._weights.specs[kernel].shape)[lead : lead + contracted]
        outputs = box[lead:] if path != kernel and self._form == "int8" else box[lead + contracted :]
        source = self._weights.read(kernel, (*box[:lead], *inputs, *outputs))
        layers = source if lead else source[None]
        made = [quantize(layer, contracted, self._form)[path != kernel] for layer in layers]
        return np.stack(made) if lead else made[0]

    def _layers(self, path: str) -> int:
        return 1 if STACKED.match(path) else 0


class Dequantized:
    """The numbers that rounded kernels of a decoder stand for, in the type of its embedding; the rest as it is."""

    def __init__(self, weights: Weights, model: ModelConfig, form: str) -> None:
        self._weights, self._form = weights, form
        self._contracted: Mapping[str, int] = contracted_of(model.llm)
        dense = abstract_model(model).shapes
        dtype = weights.specs["llm/embedding"].dtype
        self.specs: dict[str, Spec] = {
            path: Spec(tuple(dense[path].shape), dtype) if path in self._contracted else spec
            for path, spec in weights.specs.items()
            if not path.endswith(f"/{SCALE}")
        }

    def read(self, path: str, box: Box) -> np.ndarray:
        """See `Weights`."""
        if path not in self._contracted:
            return self._weights.read(path, box)
        lead, contracted = (1 if STACKED.match(path) else 0), self._contracted[path]
        kernel, scale = self._weights.specs[path].shape, self._weights.specs[_scale_of(path)].shape
        outputs = box[lead + contracted :]
        inputs = scale[lead : len(scale) - len(outputs)]  # none, or groups of them
        parts = []
        for layer in range(box[0].start, box[0].stop) if lead else (None,):
            first: Box = () if layer is None else (slice(layer, layer + 1),)
            packed = self._weights.read(path, (*first, *whole(kernel[lead : lead + contracted]), *outputs))
            factor = self._weights.read(_scale_of(path), (*first, *whole(inputs), *outputs))
            packed, factor = (packed[0], factor[0]) if lead else (packed, factor)
            parts.append(dequantize(packed, factor, contracted)[box[lead : lead + contracted]])
        return (np.stack(parts) if lead else parts[0]).astype(self.specs[path].dtype)


def _scale_of(kernel: str) -> str:
    return kernel.removesuffix(KERNEL) + SCALE
