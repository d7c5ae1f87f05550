"""An endless, reshuffled list of indices with random access: no epoch's order is held in memory."""

import sys

_ROUNDS = 8
_MASK64 = (1 << 64) - 1


class EndlessShuffle:
    """A stream that holds all of 0..n-1 in each epoch, in a different order every time.

    A source for `grain.MapDataset`. Each order is a keyed permutation (a balanced Feistel network on the
    smallest even number of bits that holds n, walked until it falls below n: Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002), so that any position costs microseconds and no memory. Grain's own
    shuffle is made for large n: it takes milliseconds a position where n is small.
    """

    def __init__(self, n: int, seed: int) -> None:
        """`n` indices, at least one; the order is a function of `seed` and the epoch."""
        self._n = n
        self._seed = seed
        self._half = max(1, ((n - 1).bit_length() + 1) // 2)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, position: int) -> int:
        """The index at a position of the stream."""
        epoch, index = divmod(position, self._n)
        keys = _round_keys(self._seed, epoch)
        half, mask = self._half, (1 << self._half) - 1
        while True:
            left, right = index >> half, index & mask
            for key in keys:
                left, right = right, left ^ (_mix(right + key) & mask)
            index = left << half | right
            if index < self._n:
                return index

    def __repr__(self) -> str:
        return f"EndlessShuffle(n={self._n}, seed={self._seed})"


def _round_keys(seed: int, epoch: int) -> list[int]:
    key = _mix(_mix(seed & _MASK64) + epoch)
    return [_mix(key + i) for i in range(1, _ROUNDS + 1)]


def _mix(x: int) -> int:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014), on 64 bits."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)
