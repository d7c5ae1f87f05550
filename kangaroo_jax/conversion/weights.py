"""Weights under our names, from any source, read a box at a time.

A conversion writes `Weights` of one kind as files of another, with only a few boxes in memory.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import ml_dtypes
import numpy as np

from kangaroo_jax.checkpoints.stored import Box, Spec, check_finite, whole
from kangaroo_jax.conversion.files import Tensors
from kangaroo_jax.conversion.names import SPECIAL, STACKED, NameRow
from kangaroo_jax.errors import UserError

BOX_BYTES = 192 << 20  # the largest box that is read at once, if the layout allows cutting
TILE = 128  # side of a tile in numbers
VOCABULARY = {"llm/embedding": 0, "llm/head/kernel": 1}  # parameters with a row for each token, and its axis


class Weights(Protocol):
    """Parameters by path."""

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Shape and type of each parameter."""

    def read(self, path: str, box: Box) -> np.ndarray:
        """The numbers in `box` of a parameter. Raises UserError for a damaged file."""


def boxes(spec: Spec, path: str, cut_axis: int | None) -> list[Box]:
    """A parameter in boxes: one for each layer of a stack, and ranges of `cut_axis` if it is large."""
    if STACKED.match(path):
        return [(slice(i, i + 1), *whole(spec.shape[1:])) for i in range(spec.shape[0])]
    nbytes = int(np.prod(spec.shape)) * spec.dtype.itemsize
    if cut_axis is None or nbytes <= BOX_BYTES:
        return [whole(spec.shape)]
    length = spec.shape[cut_axis]
    step = -(-length // -(-nbytes // BOX_BYTES))
    cuts = [slice(start, min(start + step, length)) for start in range(0, length, step)]
    return [tuple(cut if axis == cut_axis else slice(0, n) for axis, n in enumerate(spec.shape)) for cut in cuts]


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in C order. If the order changes, it copies tiles that fit a CPU's cache: half of numpy's time."""
    fast = min(range(array.ndim), key=lambda axis: (array.shape[axis] == 1, array.strides[axis]), default=0)
    last = array.ndim - 1
    if array.flags.c_contiguous or fast == last or array.size < TILE**2:
        return np.ascontiguousarray(array)
    result = np.empty(array.shape, array.dtype)
    steps = [TILE if axis in (fast, last) else 1 for axis in range(array.ndim)]
    starts = (range(0, size, step) for size, step in zip(array.shape, steps, strict=True))
    for corner in itertools.product(*starts):
        tile = tuple(slice(start, start + step) for start, step in zip(corner, steps, strict=True))
        result[tile] = array[tile]
    return result


class Mapped:
    """Files of another layout as weights under our names."""

    def __init__(self, tensors: Tensors, rows: Sequence[NameRow]) -> None:
        """The tensors must be those of the rows (see `names.match`). Raises UserError for layers of several types."""
        self._tensors, self._rows = tensors, {(row.ours, row.layer): row for row in rows}
        self.specs: dict[str, Spec] = {}
        for row in rows:
            tensor = tensors[row.theirs]
            if tensor.dtype.kind not in "fV":
                raise UserError(f"{tensor.file}: tensor {row.theirs} is of type {tensor.dtype}, no kind of float")
            shape = row.shape_here if row.layer is None else (row.layer + 1, *row.shape_here)
            before = self.specs.get(row.ours)
            if before and before.dtype != tensor.dtype:
                raise UserError(
                    f"{tensor.file}: {row.theirs} is {tensor.dtype}, that of other layers {before.dtype}; make them one"
                )
            self.specs[row.ours] = Spec(shape, tensor.dtype)

    def row(self, path: str, layer: int | None) -> NameRow:
        """The row of a parameter's layer."""
        return self._rows[path, layer]

    def read(self, path: str, box: Box) -> np.ndarray:
        """See `Weights`."""
        if not STACKED.match(path):
            return self._read(self._rows[path, None], box)
        layers = range(*box[0].indices(self.specs[path].shape[0]))
        return np.stack([self._read(self._rows[path, layer], box[1:]) for layer in layers])

    def _read(self, row: NameRow, box: Box) -> np.ndarray:
        tensor = self._tensors[row.theirs]
        if row.rows:
            array = np.concatenate([tensor.read(i, i + 1) for i in row.rows])[box]
        elif row.cut_axis is not None and all(
            s == slice(0, n) for a, (s, n) in enumerate(zip(box, row.shape_here, strict=True)) if a != row.cut_axis
        ):
            cut = box[row.cut_axis]
            array = row.here(tensor.read(cut.start, cut.stop))
        else:
            array = row.here(tensor.read())[box]
        array = contiguous(array)
        check_finite(array, row.theirs, tensor.file)
        return array


class Joined:
    """Several weights as one; a path in several of them comes from the first."""

    def __init__(self, *parts: Weights) -> None:
        self._parts: dict[str, Weights] = {}
        for part in reversed(parts):
            self._parts.update(dict.fromkeys(part.specs, part))
        self.specs = {path: part.specs[path] for path, part in self._parts.items()}

    def read(self, path: str, box: Box) -> np.ndarray:
        """See `Weights`."""
        return self._parts[path].read(path, box)


class Arrays:
    """Small weights that are made at the first read."""

    def __init__(self, makers: Mapping[str, tuple[Spec, Callable[[], np.ndarray]]]) -> None:
        """path -> its spec, and the function that makes it."""
        self.specs = {path: spec for path, (spec, _) in makers.items()}
        self._makers, self._made = makers, dict[str, np.ndarray]()

    @classmethod
    def holding(cls, arrays: Mapping[str, np.ndarray]) -> "Arrays":
        """These arrays, by path."""
        return cls({path: (Spec(a.shape, a.dtype), functools.partial(np.asarray, a)) for path, a in arrays.items()})

    def read(self, path: str, box: Box) -> np.ndarray:
        """See `Weights`."""
        if path not in self._made:
            spec, make = self._makers[path]
            self._made[path] = make().astype(spec.dtype).reshape(spec.shape)
        return self._made[path][box]


class Cast:
    """Weights in other types."""

    def __init__(self, weights: Weights, dtypes: Mapping[str, np.dtype]) -> None:
        """`dtypes` by path; a path without one keeps its own."""
        self._weights = weights
        self.specs = {path: Spec(s.shape, dtypes.get(path, s.dtype)) for path, s in weights.specs.items()}

    def read(self, path: str, box: Box) -> np.ndarray:
        """See `Weights`; rounds to nearest even. Raises UserError if a number overflows."""
        array, dtype = self._weights.read(path, box), self.specs[path].dtype
        if array.dtype == dtype:
            return array
        with np.errstate(over="ignore"):
            cast = array.astype(dtype)
        if dtype.name == "float16":
            check_finite(cast, path, "float16 is too small: choose --dtype=bfloat16")
        return cast


class Overlaid:
    """Weights with other numbers in some rows of the token embedding: those that the marks replace."""

    def __init__(self, weights: Weights, rows: Sequence[int], values: np.ndarray) -> None:
        """`values` [len(rows), D] replace `rows` of llm/embedding."""
        self._weights, self._rows, self._values = weights, tuple(rows), values
        self.specs = weights.specs

    def read(self, path: str, box: Box) -> np.ndarray:
        """See `Weights`."""
        array = self._weights.read(path, box)
        if path == "llm/embedding":
            array = array.copy()
            for row, value in zip(self._rows, self._values, strict=True):
                if box[0].start <= row < box[0].stop:
                    array[row - box[0].start] = value[box[1]]
        return array


class Grown:
    """Weights with more rows at the end of the vocabulary: each is the mean of those that the decoder brought."""

    def __init__(self, weights: Weights, rows: int) -> None:
        """`rows`: how many more."""
        self._weights, self._rows = weights, rows
        self._means: dict[str, np.ndarray] = {}
        self.specs: dict[str, Spec] = dict(weights.specs)
        for path, axis in VOCABULARY.items():
            if path in self.specs:
                shape = list(self.specs[path].shape)
                shape[axis] += rows
                self.specs[path] = Spec(tuple(shape), self.specs[path].dtype)

    def read(self, path: str, box: Box) -> np.ndarray:
        """See `Weights`."""
        axis = VOCABULARY.get(path)
        if axis is None:
            return self._weights.read(path, box)
        known, cut = self._weights.specs[path].shape[axis], box[axis]
        parts = []
        if cut.start < known:
            inner = [*box]
            inner[axis] = slice(cut.start, min(cut.stop, known))
            parts.append(self._weights.read(path, tuple(inner)))
        if (more := cut.stop - max(cut.start, known)) > 0:
            row = np.expand_dims(self._mean(path, axis)[box[1 - axis]], axis)
            parts.append(np.repeat(row, more, axis))
        return np.concatenate(parts, axis)

    def _mean(self, path: str, axis: int) -> np.ndarray:
        if path not in self._means:
            spec = self._weights.specs[path]
            total = np.zeros(spec.shape[1 - axis])
            for box in boxes(spec, path, axis):
                total += self._weights.read(path, box).sum(axis=axis, dtype=np.float64)
            self._means[path] = (total / spec.shape[axis]).astype(spec.dtype)
        return self._means[path]


class Shrunk:
    """Weights without the last rows of the vocabulary."""

    def __init__(self, weights: Weights, rows: int) -> None:
        """`rows`: how many fewer."""
        self._weights = weights
        self.specs: dict[str, Spec] = dict(weights.specs)
        for path, axis in VOCABULARY.items():
            if path in self.specs:
                shape = list(self.specs[path].shape)
                shape[axis] -= rows
                self.specs[path] = Spec(tuple(shape), self.specs[path].dtype)

    def read(self, path: str, box: Box) -> np.ndarray:
        """See `Weights`."""
        return self._weights.read(path, box)


class Marked:
    """Weights with the release's token embedding: the four marks are in their rows, and `special_embedding` is gone."""

    def __init__(self, weights: Weights, rows: Sequence[int]) -> None:
        """`rows`: the ids of the marks."""
        special = weights.specs[SPECIAL]
        dtype = wider(weights.specs["llm/embedding"].dtype, special.dtype)
        values = weights.read(SPECIAL, whole(special.shape)).astype(dtype)
        self._weights = Overlaid(Cast(weights, {"llm/embedding": dtype}), rows, values)
        self.specs = {path: spec for path, spec in self._weights.specs.items() if path != SPECIAL}

    def read(self, path: str, box: Box) -> np.ndarray:
        """See `Weights`."""
        return self._weights.read(path, box)


def wider(a: np.dtype, b: np.dtype) -> np.dtype:
    """The smallest type that holds both exactly."""
    if a == b:
        return a
    return np.dtype(np.float64) if np.dtype(np.float64) in (a, b) else np.dtype(np.float32)


def dtype_named(name: str) -> np.dtype:
    """The type of `--dtype`. Raises UserError."""
    known = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
    if name not in known:
        raise UserError(f"--dtype={name}: use one of keep, {', '.join(known)}")
    return known[name]
