"""Arrays of a checkpoint, read a box at a time: whatever training or a conversion wrote, with none whole in memory."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kangaroo_jax.errors import UserError, one_line
from kangaroo_jax.models.quantized import KERNEL, SCALE
from kangaroo_jax.system.json_text import read_json

MOST_PACKED = 100  # largest ratio of bytes in arrays to bytes in files: weights compress by less than 2

Box = tuple[slice, ...]  # a range of every dimension
_EXPONENTS = {2: (np.uint16, {"bfloat16": 0x7F80, "float16": 0x7C00}), 4: (np.uint32, {"float32": 0x7F800000})}


@dataclasses.dataclass(frozen=True)
class Spec:
    """Shape (with the leading axis of layers) and type of a parameter."""

    shape: tuple[int, ...]
    dtype: np.dtype


def whole(shape: Sequence[int]) -> Box:
    """The box that covers a whole array."""
    return tuple(slice(0, n) for n in shape)


def check_finite(array: np.ndarray, name: str, where: object) -> None:
    """Raise UserError with the count of NaN and infinite numbers if there are any; one pass over the exponents."""
    if array.dtype.kind in "iu":
        return
    itemsize = array.dtype.itemsize
    mask = _EXPONENTS.get(itemsize, (None, {}))[1].get(array.dtype.name)
    if mask is None:
        bad = int(array.size - np.isfinite(array.astype(np.float64)).sum())
    else:
        bits = np.ascontiguousarray(array).reshape(-1).view(_EXPONENTS[itemsize][0])
        bad, step = 0, 1 << 18
        for start in range(0, bits.size, step):
            part = bits[start : start + step] & mask
            if part.max(initial=0) == mask:
                bad += int((part == mask).sum())
    if bad:
        raise UserError(f"{where}: {bad} of {array.size} numbers of {name} are NaN or infinite; the weights are broken")


class Stored:
    """The parameters of an Orbax checkpoint."""

    def __init__(self, *folders: Path) -> None:
        """`folders`: `params`, and the folder of frozen weights. Raises UserError if one is no flat dictionary."""
        self._arrays: dict[str, Any] = {}
        self._folders: dict[str, Path] = {}
        self.specs: dict[str, Spec] = {}
        for folder in folders:
            self._add(folder)

    def _add(self, folder: Path) -> None:
        import tensorstore

        metadata = read_json(folder / "_METADATA")
        try:
            entries = metadata.get("tree_metadata", {}).values()
            keys = [[key["key"] for key in entry["key_metadata"]] for entry in entries]
        except (KeyError, TypeError, AttributeError):
            keys = []
        if not keys or any(len(key) != 1 for key in keys):
            raise UserError(f"{folder}: is no flat dictionary of parameters; give a checkpoint that kangaroo wrote")
        room = (64 << 20) + MOST_PACKED * sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for (path,) in keys:
            if not isinstance(path, str) or ".." in Path(path).parts or Path(path).is_absolute():
                raise UserError(f"{folder}: {path!r} is no name of a parameter")
            self._folders[path] = folder
            self._arrays[path] = array = _open(tensorstore, folder, path, metadata)
            dtype = np.dtype(ml_dtypes.bfloat16) if array.dtype.name == "bfloat16" else array.dtype.numpy_dtype
            self.specs[path] = Spec(tuple(array.shape), dtype)
            room -= math.prod(array.shape) * dtype.itemsize
            if room < 0:
                raise UserError(f"{folder}: its arrays claim far more than its files hold; copy the checkpoint again")

    def read(self, path: str, box: Box) -> np.ndarray:
        """The numbers in `box` of a parameter. Raises UserError for a damaged file."""
        try:
            array = self._arrays[path][box].read().result()
        except ValueError as error:
            where, why = self._folders[path], one_line(error)[:200]
            raise UserError(f"{where}: {path} cannot be read ({why})") from None
        array = np.ascontiguousarray(array).view(self.specs[path].dtype)
        check_finite(array, path, self._folders[path])
        return array

    def layers(self, path: str) -> Iterator[np.ndarray]:
        """A parameter, one index of its first axis at a time where it has more than two: stacked layers. See `read`."""
        shape = self.specs[path].shape
        if len(shape) < 3:
            yield self.read(path, whole(shape))
            return
        for first in range(shape[0]):
            yield self.read(path, (slice(first, first + 1), *whole(shape[1:])))

    def pieces(self, path: str, axis: int, nbytes: int) -> list[slice]:
        """Ranges of an axis, each of whole chunks and, where these are small enough, at most `nbytes`."""
        length = self.specs[path].shape[axis]
        chunk = self._arrays[path].chunk_layout.read_chunk.shape[axis]
        one = math.prod(self.specs[path].shape) // length * chunk * self.specs[path].dtype.itemsize
        step = max(1, nbytes // one) * chunk
        return [slice(first, min(first + step, length)) for first in range(0, length, step)]

    def forget(self, path: str) -> None:
        """A parameter will not be read again: free what is cached of its chunks."""
        del self._arrays[path]


def _open(tensorstore: Any, folder: Path, path: str, metadata: Mapping[str, Any]) -> Any:
    base = {"driver": "file", "path": f"{folder}/"}
    if (folder / "manifest.ocdbt").is_file():
        kvstore: dict[str, Any] = {"driver": "ocdbt", "base": base, "path": f"{path}/"}
    else:
        kvstore = {**base, "path": f"{folder}/{path}/"}
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    spec = {"driver": driver, "kvstore": kvstore}
    try:
        array = tensorstore.open(spec, read=True, open=True).result()
        # A cache for the chunks of one layer: a chunk of several layers is decoded only once.
        layers = array.chunk_layout.read_chunk.shape[0] if array.ndim else 1
        nbytes = math.prod(array.shape[1:]) * layers * array.dtype.numpy_dtype.itemsize
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": nbytes + 1 if layers > 1 else 0}})
        return tensorstore.open(spec, read=True, open=True, context=context).result()
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"{folder}: {path} cannot be read ({one_line(error)[:200]})") from None


def stored_form(stored: Stored) -> str | None:
    """The format in which a checkpoint's decoder is quantised, None where it is not."""
    scaled = [name.removesuffix(SCALE) + KERNEL for name in stored.specs if name.endswith("/" + SCALE)]
    kinds = {stored.specs[name].dtype.name for name in scaled if name in stored.specs}
    if not scaled:
        return None
    return "int8" if "int8" in kinds else "int4"
