"""The loss of a batch by source and language, from a forward pass of its own before a step that is logged."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kangaroo_jax.conventions import PackedBatch
from kangaroo_jax.data.batches.stream import LoaderStats


class LossBySource:
    """Losses of tokens that a device still computes, and whose tokens they are."""

    def __init__(self, losses: jax.Array, batch: PackedBatch, stats: LoaderStats, rows: Sequence[int]) -> None:
        """`losses` are of the whole batch; `batch`, arrays of NumPy, has the `rows` that this host reads."""
        self._losses, self._rows, self._kinds = losses, {row: i for i, row in enumerate(rows)}, stats.rows
        self._segments, self._weights = np.asarray(batch.segment_ids), np.asarray(batch.weights)

    def means(self) -> dict[str, float]:
        """ "source/language" -> the mean loss of its targets, by their weights, in this host's rows."""
        sums: dict[str, float] = collections.defaultdict(float)
        weights: dict[str, float] = collections.defaultdict(float)
        pieces: Mapping[str, Any] = {str(piece.index): piece for piece in self._losses.addressable_shards}
        for piece in pieces.values():
            columns = piece.index[1]
            for losses, row in zip(np.asarray(piece.data), self._numbers(piece.index[0]), strict=True):
                if row not in self._rows:
                    continue
                own = self._rows[row]
                segments, weight = self._segments[own, columns], self._weights[own, columns].astype(np.float64)
                for number, kind in enumerate(self._kinds[own], start=1):
                    here = segments == number
                    sums[kind] += float(np.sum(losses[here] * weight[here]))
                    weights[kind] += float(np.sum(weight[here]))
        return {kind: round(sums[kind] / weight, 6) for kind, weight in sorted(weights.items()) if weight}

    def _numbers(self, rows: slice) -> range:
        return range(*rows.indices(self._losses.shape[0]))
