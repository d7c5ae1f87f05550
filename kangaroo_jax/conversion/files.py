"""Reads files of tensors: safetensors, torch's zip or pickle (weights only) and Meta's shards.

Data are read on demand, one tensor or some of its rows at a time.
"""

import dataclasses
import math
import os
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kangaroo_jax.errors import UserError
from kangaroo_jax.system.installing import install_line
from kangaroo_jax.system.json_text import read_json

DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PREFIXES = ("module.", "_orig_mod.", "base_model.model.")  # prefixes that model wrappers add to every name
POINTER = b"version https://git-lfs.github.com/spec/"  # the start of a file that git-lfs has not fetched
# Files without weights that transformers' Trainer leaves beside them.
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state(_\d+)?)\.(bin|pt|pth)")
# Errors that torch raises for damaged files.
_DAMAGED = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    OverflowError,
    AssertionError,
)
WRAPPERS = ("state_dict", "module", "model_state_dict", "model")  # keys under which checkpoints hold their weights
# The axis along which Meta cuts a tensor for several files ("model parallel"); norms are in every file.
META_AXES = {r"tok_embeddings|output|.*\.(wq|wk|wv|w1|w3)": 0, r".*\.(wo|w2)": 1}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    read_rows: Callable[[int, int], np.ndarray] = dataclasses.field(repr=False)  # first, last + 1 -> an array

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The tensor, or its rows `start` to `stop` (along the first axis). Raises UserError for a short file."""
        return self.read_rows(start, self.shape[0] if stop is None and self.shape else stop or 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


Tensors = Mapping[str, Tensor]


def open_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file or folder. In a folder they come from the files that transformers would take, else from
    Meta's consolidated.*.pth, else from all files of one kind.

    Raises:
        UserError: nothing to read, a damaged file, a missing shard, or a name in two files.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_file():
        return _open_file(path)
    for kind in ("model.safetensors", "pytorch_model.bin"):  # in the order of transformers
        if (path / kind).is_file():
            return _open_file(path / kind)
        if (path / f"{kind}.index.json").is_file():
            return _open_index(path / f"{kind}.index.json")
    if shards := sorted(path.glob("consolidated.*.pth")):
        return _join_meta([_open_file(shard) for shard in shards])
    for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth"):
        if files := [file for file in sorted(path.glob(pattern)) if _may_hold_weights(file)]:
            return _merge(_complete(files))
    raise UserError(f"{path}: no weights here (looked for *.safetensors, *.bin, *.pt, consolidated.*.pth)")


def open_model(path: str | Path) -> dict[str, Tensor]:
    """`open_tensors`, with wrappers' prefixes removed from the names (see `unwrapped`)."""
    tensors = open_tensors(path)
    return {short: tensors[name] for name, short in unwrapped(tensors).items()}


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """name -> the name without the prefixes of DDP, `torch.compile` and PEFT, if every name has them."""
    short = {name: name for name in names}
    while prefix := next((p for p in PREFIXES if short and all(n.startswith(p) for n in short.values())), ""):
        short = {name: now.removeprefix(prefix) for name, now in short.items()}
    return short


def left_aside(path: Path, read: Iterable[Path]) -> list[str]:
    """The names of files in a folder that look like weights but were not read."""
    if path.is_file():
        return []
    taken = {file.name for file in read}
    found = [f for suffix in ("safetensors", "bin", "pt", "pth") for f in path.glob(f"*.{suffix}")]
    names = [file.name for file in found if file.name not in taken and _may_hold_weights(file)]
    if taken & {"model.safetensors", "pytorch_model.bin"}:
        names += [file.name for file in path.glob("*.index.json")]
    return sorted(names)


def _may_hold_weights(file: Path) -> bool:
    return file.name != "kangaroo_jax.safetensors" and NO_WEIGHTS.fullmatch(file.name) is None


def files_of(tensors: Tensors) -> list[Path]:
    """The files that hold the tensors."""
    return sorted({tensor.file for tensor in tensors.values()})


def _open_file(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise UserError(f"{path}: a git-lfs pointer, not the weights themselves; fetch them with git lfs pull")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        return _open_torch(path)
    raise UserError(f"{path}: weights are read from *.safetensors, *.bin, *.pt and *.pth")


def _open_index(path: Path) -> dict[str, Tensor]:
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(shard, str) for shard in places.values()):
        raise UserError(f"{path}: has no weight_map; the file is damaged")
    opened: dict[str, dict[str, Tensor]] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:
            raise UserError(f"{path}: names {shard!r}, which is no file beside it")
        if not (path.parent / shard).is_file():
            raise UserError(
                f"{path.parent / shard}: missing; {path.name} says that it holds weights, download it again"
            )
        opened[shard] = _open_file(path.parent / shard)
    lost = [f"{name} in {shard}" for name, shard in places.items() if name not in opened[shard]]
    if lost:
        raise UserError(f"{path}: names tensors that are not where it says: {', '.join(lost)}")
    return _merge([path.parent / shard for shard in opened], opened)


def _complete(files: list[Path]) -> list[Path]:
    """The files, after a check that no shard NAME-00001-of-0000N is missing."""
    for file in files:
        parts = re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\..*)", file.name)
        for number in range(1, int(parts[4]) + 1) if parts else ():
            name = f"{parts[1]}{number:0{len(parts[2])}d}{parts[3]}{parts[4]}{parts[5]}" if parts else ""
            if not (file.parent / name).is_file():
                raise UserError(f"{file.parent / name}: missing; it is one of {int(parts[4]) if parts else 0} shards")
    return files


def _merge(files: Iterable[Path], opened: Mapping[str, dict[str, Tensor]] | None = None) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in (opened[file.name] if opened else _open_file(file)).items():
            if name in merged:
                raise UserError(f"{file}: tensor {name} is also in {merged[name].file.name}; remove one of the two")
            merged[name] = tensor
    return merged


# ------------------------------------------------------------------------------- safetensors


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, whose header the library reads and checks: no holes, no overlaps, no rest.

    The rows are read here, not by the library: it maps the file, so its pages count as memory of this process, and a
    file that is cut meanwhile kills the process.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as start, safe_open(path, framework="np") as file:
            position = 8 + int.from_bytes(start.read(8), "little")
            entries = {name: file.get_slice(name) for name in file.offset_keys()}
            types = {name: (entry.get_dtype(), tuple(entry.get_shape())) for name, entry in entries.items()}
    except (SafetensorError, OSError, OverflowError) as error:
        raise UserError(f"{path}: damaged or cut short ({_first_line(error)}); download it again") from None
    size, tensors = path.stat().st_size, {}
    for name, (kind, shape) in types.items():
        if kind not in DTYPES:
            raise UserError(f"{path}: tensor {name} is of type {kind}, which is not read; use F32, BF16 or F16")
        if max(shape, default=0) > size:
            raise UserError(f"{path}: damaged: tensor {name} claims more than a file of this size holds")
        tensors[name] = _safetensor(path, DTYPES[kind], shape, position)
        position += tensors[name].nbytes
    return tensors


def _safetensor(path: Path, dtype: np.dtype, shape: tuple[int, ...], begin: int) -> Tensor:
    def read_rows(start: int, stop: int) -> np.ndarray:
        wanted = (stop - start, *shape[1:]) if shape else ()
        row = math.prod(shape[1:]) * dtype.itemsize
        array = np.empty(math.prod(wanted) * dtype.itemsize, np.uint8)
        _read_into(path, array, begin + start * row)
        return array.view(dtype).reshape(wanted)

    return Tensor(shape, dtype, path, read_rows)


def _read_into(path: Path, array: np.ndarray, offset: int) -> None:
    view, done = memoryview(array.data), 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while done < len(view):
            got = os.preadv(descriptor, [view[done : done + (1 << 30)]], offset + done)
            if not got:
                raise UserError(f"{path}: cut short while it was read")
            done += got
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------- torch


def _open_torch(path: Path) -> dict[str, Tensor]:
    """Tensors of a torch file. Only tensors and plain containers are unpickled, never another object."""
    torch = import_torch(f"{path.name} is a torch file")
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            loaded = torch.load(path, map_location="cpu", weights_only=True)  # also reads the format before torch 1.6
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\w+\.[\w.]+)", str(error))
        what = f"it refers to {found[1].rstrip('.')}" if found else "it holds more than tensors"
        raise UserError(
            f"{path}: refused, nothing of it was run: {what}, which is no weight; get the weights as safetensors"
        ) from None
    except _DAMAGED as error:
        raise UserError(f"{path}: damaged or no torch file ({_first_line(error)})") from None
    except MemoryError:
        raise UserError(f"{path}: damaged: it claims more than the memory holds") from None
    state = _state_dict(loaded)
    if not state:
        raise UserError(f"{path}: holds no dictionary of tensors (found {type(loaded).__name__})")
    return {name: _torch_tensor(path, name, tensor) for name, tensor in state.items()}


def _state_dict(loaded: Any, depth: int = len(WRAPPERS)) -> dict[str, Any]:
    """The state dict in a loaded object; a training script may nest it under keys of WRAPPERS."""
    if not isinstance(loaded, Mapping) or not depth:
        return {}
    for key in WRAPPERS:
        if isinstance(loaded.get(key), Mapping):
            return _state_dict(loaded[key], depth - 1)
    state = {str(name): value for name, value in loaded.items() if hasattr(value, "untyped_storage")}
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _torch_tensor(path: Path, name: str, tensor: Any) -> Tensor:
    dtype = np.dtype(ml_dtypes.bfloat16) if str(tensor.dtype) == "torch.bfloat16" else None
    try:
        dtype = dtype or np.dtype(str(tensor.dtype).removeprefix("torch."))
    except TypeError:
        dtype = None
    if dtype is None or (dtype.itemsize < 2 and dtype.kind in "fV"):  # float8: its scales are stored elsewhere
        raise UserError(f"{path}: tensor {name} is of type {tensor.dtype}, which is not read; use bfloat16 or float32")
    if str(tensor.layout) != "torch.strided" or tensor.is_meta:
        raise UserError(f"{path}: tensor {name} holds no plain numbers ({tensor.layout}, {tensor.device})")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(f"{path}: tensor {name} of shape {tuple(tensor.shape)} claims more than the file holds")

    def read_rows(start: int, stop: int) -> np.ndarray:
        part = tensor.detach()[start:stop].contiguous() if tensor.ndim else tensor.detach()
        if dtype == ml_dtypes.bfloat16:
            import torch

            return part.view(torch.int16).numpy().view(dtype)
        return part.numpy()

    return Tensor(tuple(tensor.shape), dtype, path, read_rows)


def import_torch(why: str) -> Any:
    """The module torch. Raises UserError that begins with `why` if it is not installed."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{why} and torch is not installed: {install_line('convert')}") from None
    return torch


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _join_meta(shards: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Meta's files of one model as one: tensors that are cut over files are joined as they are read."""
    if len(shards) == 1:
        return shards[0]
    joined = {}
    for name, first in shards[0].items():
        for shard in shards:
            if set(shard) != set(shards[0]):
                odd = sorted(set(shard) ^ set(shards[0]))
                raise UserError(f"{first.file.parent}: its consolidated files differ in {', '.join(odd)}")
        axis = next((a for p, a in META_AXES.items() if re.fullmatch(rf"({p})\.weight", name)), None)
        parts = [shard[name] for shard in shards]
        joined[name] = first if axis is None else _concatenate(parts, axis)
    return joined


def _concatenate(parts: list[Tensor], axis: int) -> Tensor:
    first = parts[0]
    shape = (*first.shape[:axis], sum(part.shape[axis] for part in parts), *first.shape[axis + 1 :])

    def read_rows(start: int, stop: int) -> np.ndarray:
        return np.concatenate([part.read() for part in parts], axis=axis)[start:stop]

    return Tensor(shape, first.dtype, first.file, read_rows)
