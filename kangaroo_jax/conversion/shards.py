"""Writes files in another layout: safetensors in shards with an index, or one torch file."""

import io
import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kangaroo_jax.conversion.building import Building, ahead
from kangaroo_jax.conversion.files import NAMES, import_torch
from kangaroo_jax.conversion.names import NameRow
from kangaroo_jax.conversion.weights import Box, Weights, boxes, contiguous
from kangaroo_jax.system.progress import Progress

SHARD_BYTES = 4_000_000_000  # largest file, unless one tensor is larger
Piece = tuple[NameRow, Box]


def nbytes_there(row: NameRow, weights: Weights) -> int:
    """Bytes of a row's tensor in the other layout."""
    return math.prod(row.shape_there) * weights.specs[row.ours].dtype.itemsize


def plan_shards(rows: Sequence[NameRow], weights: Weights, limit: int = SHARD_BYTES) -> list[list[NameRow]]:
    """The rows, in order, in shards of at most `limit` bytes; within a shard the widest types come first."""
    shards: list[list[NameRow]] = [[]]
    size = 0
    for row in rows:
        nbytes = nbytes_there(row, weights)
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(row)
        size += nbytes
    return [sorted(shard, key=lambda row: -weights.specs[row.ours].dtype.itemsize) for shard in shards]


def write_safetensors(
    weights: Weights,
    rows: Sequence[NameRow],
    building: Building,
    progress: Progress,
    *,
    limit: int = SHARD_BYTES,
    stem: str = "model",
) -> None:
    """Write every row's tensor into `stem`*.safetensors, with an index if there are several files."""
    shards = plan_shards(rows, weights, limit)
    count = len(shards)
    names = [
        f"{stem}.safetensors" if count == 1 else f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
    ]
    for name, shard in zip(names, shards, strict=True):
        if building.is_done(name):
            progress.add(sum(nbytes_there(row, weights) for row in shard), skipped=True)
            continue
        with (building.folder / name).open("wb") as file:
            file.write(_header(shard, weights))
            for _, array in _pieces(shard, weights):
                file.write(array.reshape(-1).view(np.uint8).data)
                progress.add(array.nbytes)
        building.done(name)
    if count > 1:
        places = {row.theirs: name for name, shard in zip(names, shards, strict=True) for row in shard}
        total = sum(nbytes_there(row, weights) for row in rows)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (building.folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _header(shard: Sequence[NameRow], weights: Weights) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for row in shard:
        end = position + nbytes_there(row, weights)
        dtype = NAMES[weights.specs[row.ours].dtype]
        entries[row.theirs] = {"dtype": dtype, "shape": list(row.shape_there), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _pieces(rows: Sequence[NameRow], weights: Weights) -> Iterator[tuple[Piece, np.ndarray]]:
    """Every tensor in the other layout, whole or in ranges of its first axis, in order."""
    work: list[Piece] = []
    for row in rows:
        cut = boxes(weights.specs[row.ours], row.ours, row.cut_axis)
        work += [(row, box) for box in (cut if row.layer is None else cut[row.layer : row.layer + 1])]

    def read(piece: Piece) -> np.ndarray:
        row, box = piece
        array = weights.read(row.ours, box)
        return contiguous(row.there(array if row.layer is None else array[0]))

    return ahead(read, work)


# ------------------------------------------------------------------------------------- torch


def write_torch(weights: Weights, rows: Sequence[NameRow], building: Building, progress: Progress, name: str) -> None:
    """Write one torch file (zip) with a dictionary of all tensors, one after another.

    `torch.save` needs the whole dictionary in memory. The format is a zip of the storages and of the pickled
    dictionary, in which each tensor refers to a storage by number.
    """
    torch = import_torch(f"{name} is a torch file")
    with zipfile.ZipFile(building.folder / name, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        stem = Path(name).stem
        with archive.open(f"{stem}/data.pkl", "w") as file:
            file.write(_pickled(torch, rows, weights))
        with archive.open(f"{stem}/byteorder", "w") as file:
            file.write(b"little")
        pieces = _pieces(rows, weights)
        for number, row in enumerate(rows):
            with _member(archive, f"{stem}/data/{number}") as file:
                left = nbytes_there(row, weights)
                while left:
                    _, array = next(pieces)
                    file.write(array.reshape(-1).view(np.uint8).data)
                    left -= array.nbytes
                    progress.add(array.nbytes)
        with archive.open(f"{stem}/version", "w") as file:
            file.write(b"3\n")


def _member(archive: zipfile.ZipFile, name: str) -> Any:
    """A file in the archive whose content begins at a multiple of 64 bytes, as torch writes it."""
    info = zipfile.ZipInfo(name)
    begin = archive.start_dir + 30 + len(name) + 20  # the end of the local header and its 64-bit field
    padding = -(begin + 4) % 64
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    return archive.open(info, "w", force_zip64=True)


class _Tensor:
    """Pickles as a torch tensor with one storage."""

    def __init__(self, rebuild: Callable[..., Any], storage: "_Storage", shape: tuple[int, ...]) -> None:
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        self._call: Any = (rebuild, (storage, 0, shape, tuple(strides), False, OrderedDict()))

    def __reduce__(self) -> Any:
        return self._call


class _Storage:
    def __init__(self, kind: Any, number: int, size: int) -> None:
        self.key = ("storage", kind, str(number), "cpu", size)


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.key if isinstance(value, _Storage) else None


def _pickled(torch: Any, rows: Sequence[NameRow], weights: Weights) -> bytes:
    kinds = {
        "float32": torch.FloatStorage,
        "bfloat16": torch.BFloat16Storage,
        "float16": torch.HalfStorage,
        "float64": torch.DoubleStorage,
    }
    state: OrderedDict[str, Any] = OrderedDict()
    for number, row in enumerate(rows):
        shape = row.shape_there
        storage = _Storage(kinds[weights.specs[row.ours].dtype.name], number, math.prod(shape))
        state[row.theirs] = _Tensor(torch._utils._rebuild_tensor_v2, storage, shape)
    buffer: BinaryIO = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(state)
    buffer.seek(0)
    return buffer.read()
