"""LoRA adapters as PEFT stores them (Hu et al. 2021), added to the weights that they adapt."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from kangaroo_jax.conventions import UserError
from kangaroo_jax.conversion.files import open_tensors, read_json
from kangaroo_jax.conversion.names import STACKED, Row
from kangaroo_jax.conversion.sources import table_for
from kangaroo_jax.conversion.weights import Box, Spec, Weights

NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.\w+)?\.weight")
REFUSED = ("use_dora", "modules_to_save", "alpha_pattern", "rank_pattern", "lora_bias")  # what changes the sum below


class Merged:
    """Weights with W + scale * B A in place of every adapted W, summed in float32 and rounded to W's type.

    Attributes:
        adapted: names, on Hugging Face, of the matrices that change.
    """

    def __init__(self, weights: Weights, adapter: str | Path, model: ConfigDict) -> None:
        """Reads the adapter, which is small. Raises UserError where it does not fit the decoder."""
        folder = Path(adapter)
        settings = read_json(folder / "adapter_config.json")
        odd = [key for key in REFUSED if settings.get(key)]
        if odd:
            raise UserError(
                f"{folder}: the adapter uses {', '.join(odd)}, which is not added; merge it with PEFT first"
            )
        tensors = {name: tensor.read().astype(np.float32) for name, tensor in open_tensors(folder).items()}
        rank, alpha = int(settings.get("r", 0)), float(settings.get("lora_alpha", 0))
        if not rank or not alpha:
            raise UserError(f"{folder / 'adapter_config.json'}: does not say r and lora_alpha")
        self._scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
        self._weights, self._rows = weights, dict[tuple[str, int | None], Row]()
        self.specs: Mapping[str, Spec] = weights.specs
        self._factors = _pairs(tensors, folder)
        rows = {row.theirs.removesuffix(".weight"): row for row in table_for("llama", model)}
        unknown = [name for name in self._factors if name not in rows]
        if unknown:
            raise UserError(f"{folder}: adapts {', '.join(unknown)}, which the decoder does not have")
        self.adapted = sorted(self._factors)
        for name, (a, b) in self._factors.items():
            row = rows[name]
            if (b.shape[0], a.shape[1]) != row.shape_there or a.shape[0] != b.shape[1]:
                raise UserError(f"{folder}: {name} is {b.shape} x {a.shape}, but the weight is {row.shape_there}")
            self._rows[row.ours, row.layer] = row

    def read(self, path: str, box: Box) -> np.ndarray:
        """See `Weights`."""
        array = self._weights.read(path, box)
        if not STACKED.match(path):
            return self._added(array, path, None, box)
        layers = range(box[0].start, box[0].stop)
        return np.stack([self._added(array[i], path, layer, box[1:]) for i, layer in enumerate(layers)])

    def _added(self, array: np.ndarray, path: str, layer: int | None, box: Box) -> np.ndarray:
        row = self._rows.get((path, layer))
        if row is None:
            return array
        a, b = self._factors[row.theirs.removesuffix(".weight")]
        change = row.here(b @ a)[box] * np.float32(self._scale)
        return (array.astype(np.float32) + change).astype(array.dtype)


def _pairs(tensors: Mapping[str, np.ndarray], folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """name -> (A [r, in], B [out, r]). Raises UserError for anything else that the file holds."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        parts = NAME.fullmatch(name)
        if parts is None or array.ndim != 2:
            raise UserError(f"{folder}: {name} is no matrix of a LoRA adapter")
        found.setdefault(parts[1], {})[parts[2]] = array
    lacking = [name for name, pair in found.items() if len(pair) != 2]
    if lacking or not found:
        raise UserError(f"{folder}: A or B is missing of {', '.join(lacking) or 'everything'}")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}
