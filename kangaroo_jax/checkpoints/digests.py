"""Sums over the bits of arrays, computed on the devices, that reveal a changed bit when the arrays are read again.

A sum does not depend on the sharding of an array, so that one host can check what four hosts wrote. A single changed
bit always changes it: it is a sum modulo 2^32 of every element's bits times an odd number.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Digests = dict[str, tuple[int, str]]  # name of an array -> its sum and its dtype
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


@jax.jit
def _sum_and_finite(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(uint32 sum of every element's bits times an odd number from its position, whether all are finite)."""
    bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize])
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    finite = jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.floating) else jnp.bool_(True)
    return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32), finite


def digests(tree: Any) -> tuple[Digests, list[str]]:
    """(the sum of every array of `tree` by its name, names of arrays with non-finite values).

    It waits for the arrays. Every process must call it.
    """
    named = {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    found = jax.device_get({name: _sum_and_finite(x) for name, x in named.items()})
    sums = {name: (int(total), str(named[name].dtype)) for name, (total, _) in found.items()}
    return sums, [name for name, (_, finite) in found.items() if not finite]


def changed(tree: Any, saved: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(arrays of `tree` whose sum differs from the saved one, arrays with non-finite values).

    An array that was saved in another dtype, or without a sum, is not compared.
    """
    now, not_finite = digests(tree)
    wrong = [name for name, value in now.items() if name in saved and differs(value, saved[name])]
    return wrong, not_finite


def differs(now: tuple[int, str], saved: Any) -> bool:
    """Whether a sum is not the one that was saved, of an array of the same dtype."""
    return bool(saved[1] == now[1] and saved[0] != now[0])


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


class RunningDigest:
    """The sum of an array that is read a part at a time, in order, on the host."""

    def __init__(self) -> None:
        self._sum, self._elements, self._dtype = 0, 0, ""

    def add(self, part: np.ndarray) -> None:
        """The next elements, in C order."""
        unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[part.dtype.itemsize]
        bits = np.ascontiguousarray(part).reshape(-1).view(unsigned)
        for first in range(0, bits.size, _AT_A_TIME):
            piece = bits[first : first + _AT_A_TIME].astype(np.uint32)
            weighted = int(np.sum(piece * _ODD[: piece.size], dtype=np.uint32))
            begin = self._elements + first
            self._sum += weighted + 2 * begin * int(np.sum(piece, dtype=np.uint64))
        self._elements += bits.size
        self._dtype = part.dtype.name

    def add_columns(self, part: np.ndarray, first: int, columns: int) -> None:
        """Columns [R, n] from `first` on of an array [R, columns] whose other columns are added in the same way."""
        unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[part.dtype.itemsize]
        odd = np.arange(part.shape[1], dtype=np.uint32) * 2 + 1
        for row, line in enumerate(np.ascontiguousarray(part).view(unsigned)):
            bits, begin = line.astype(np.uint32), row * columns + first
            self._sum += int(np.sum(bits * odd, dtype=np.uint32)) + 2 * begin * int(np.sum(bits, dtype=np.uint64))
        self._dtype = part.dtype.name

    @property
    def value(self) -> tuple[int, str]:
        """As `digests` gives it."""
        return self._sum % 2**32, self._dtype


_AT_A_TIME = 1 << 16
_ODD = np.arange(_AT_A_TIME, dtype=np.uint32) * 2 + 1
