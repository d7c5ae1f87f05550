"""Writes files in another layout: safetensors in shards with an index, or one torch file."""

import json
import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kangaroo_jax.checkpoints.stored import Box
from kangaroo_jax.conversion.building import Building, ahead
from kangaroo_jax.conversion.files import NAMES, import_torch
from kangaroo_jax.conversion.names import NameRow
from kangaroo_jax.conversion.weights import Weights, boxes, contiguous
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
    """Written by hand: the library needs all arrays in memory, and these are read one after another."""
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
    """Write one torch file, a dictionary of all tensors.

    `torch.save` needs the whole dictionary: its tensors are mapped from a safetensors file, which is removed after.
    """
    torch = import_torch(f"{name} is a torch file")
    from safetensors.torch import load_file

    stem = Path(name).stem
    total = sum(nbytes_there(row, weights) for row in rows)
    building.need(2 * total)
    write_safetensors(weights, rows, building, progress, limit=total + 1, stem=stem)
    beside = building.folder / f"{stem}.safetensors"
    state = load_file(beside)
    with (building.folder / name).open("wb") as file:
        try:
            torch.save({row.theirs: state[row.theirs] for row in rows}, file)
        except RuntimeError as error:  # what torch makes of a full disk
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    beside.unlink()
