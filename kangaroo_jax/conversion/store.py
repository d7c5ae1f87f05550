"""Our own checkpoints (Orbax), a box at a time: reads what training wrote, writes without a whole array in memory.

    DIR/params/{_METADATA, PATH/{.zarray, 0.0.0}}    DIR/config    DIR/tokenizer.*

It writes Orbax's plain (not OCDBT) zarr arrays, uncompressed, with one file for each layer of a stacked parameter, so
that a conversion can stop and go on at any file. Orbax restores them like any other checkpoint.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kangaroo_jax.checkpoints.stored import Box, Spec
from kangaroo_jax.conversion.building import Building, ahead
from kangaroo_jax.conversion.weights import VOCABULARY, Weights, boxes
from kangaroo_jax.system.progress import Progress

_ZARR_DTYPES = {
    **{"bfloat16": "bfloat16", "float32": "<f4", "float16": "<f2", "float64": "<f8"},
    **{"int8": "|i1", "uint8": "|u1"},  # of quantised kernels
}


def write_params(weights: Weights, building: Building, progress: Progress) -> None:
    """Write a checkpoint's `params` into the folder under construction. Raises UserError and OSError."""
    folder = building.folder / "params"
    work = []
    for path, spec in weights.specs.items():
        cut = boxes(spec, path, VOCABULARY.get(path))
        _write_array_metadata(folder / path, spec, cut[0])
        work += [(path, box, cut[0]) for box in cut]
    todo = []
    for path, box, first in work:
        if building.is_done(_chunk_name(path, box, first)):
            progress.add(_nbytes(weights.specs[path], box), skipped=True)
        else:
            todo.append((path, box, first))
    for (path, box, first), array in ahead(lambda item: _padded(weights.read(item[0], item[1]), item[2]), todo):
        name = _chunk_name(path, box, first)
        with (folder / name).open("wb") as file:
            file.write(array.reshape(-1).view(np.uint8).data)
        building.done(name)
        progress.add(_nbytes(weights.specs[path], box))
    tree = {
        str((path,)): {
            "key_metadata": [{"key": path, "key_type": 2}],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(spec.shape)},
        }
        for path, spec in weights.specs.items()
    }
    whole = dict(tree_metadata=tree, use_ocdbt=False, use_zarr3=False, custom_metadata=None)
    whole["store_array_data_equal_to_fill_value"] = True
    (folder / "_METADATA").write_text(json.dumps(whole), encoding="utf-8")


def _write_array_metadata(folder: Path, spec: Spec, first: Box) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {
        "zarr_format": 2,
        "shape": list(spec.shape),
        "chunks": [s.stop - s.start for s in first],
        "dtype": _ZARR_DTYPES[spec.dtype.name],
        "compressor": None,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "dimension_separator": ".",
    }
    (folder / ".zarray").write_text(json.dumps(metadata), encoding="utf-8")


def _chunk_name(path: str, box: Box, first: Box) -> str:
    return f"{path}/{'.'.join(str(s.start // (f.stop - f.start)) for s, f in zip(box, first, strict=True))}"


def _padded(array: np.ndarray, first: Box) -> np.ndarray:
    """The chunk padded to the full chunk size, as zarr stores it at the border."""
    pad = [(0, s.stop - s.start - n) for s, n in zip(first, array.shape, strict=True)]
    return np.ascontiguousarray(np.pad(array, pad) if any(after for _, after in pad) else array)


def _nbytes(spec: Spec, box: Box) -> int:
    return math.prod(s.stop - s.start for s in box) * spec.dtype.itemsize


def write_config(config: Mapping[str, Any], folder: Path) -> None:
    """Write a stage's config as training does."""
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(folder / "config", args=ocp.args.JsonSave(dict(config)), force=True)
