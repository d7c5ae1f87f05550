"""What a saved data position means: rows and orders are these, so that a run goes on under a later version too."""

import numpy as np
import pytest

from kangaroo_jax.data.batches.packing import Packer, fill_row
from kangaroo_jax.data.batches.shuffle import EndlessShuffle
from kangaroo_jax.errors import UserError
from tests.data.test_packing import indices_of, make

# fmt: off
ROWS = [[0, 2, 3], [4, 6, 10], [7, 11, 12], [14, 15], [16, 18], [17, 19], [9, 20, 22], [5, 13], [21, 27], [26, 28,
    29], [1, 32, 33], [23, 35], [31, 34, 37], [25, 39], [41, 42], [8, 44], [40, 43, 46], [36, 45, 49], [30, 51],
    [50], [53, 54], [55, 56], [58, 59], [57, 60], [61, 63], [62, 64, 65, 66], [38, 67, 69], [70, 71], [72, 73, 74],
    [68, 77, 79], [52, 78, 82], [24, 76, 84], [75, 83], [80, 85, 87], [90, 91, 92, 93], [81, 95], [96, 98], [47,
    100], [102, 103, 104, 105], [48, 106], [86, 108, 109], [99, 110, 111], [112, 113, 114], [88, 115, 118]]
# fmt: on
ORDER = [3, 6, 7, 10, 1, 4, 2, 8, 0, 5, 9, 11, 10, 1, 9, 6, 0, 2, 3, 7, 8, 11, 5, 4]


def rows_of(limits: tuple[int, int], bins: int, sizes: list[tuple[int, list[int]]]) -> list[list[int]]:
    packer = Packer(*limits, bins)
    items = [make(i, text, media, 2) for i, (text, media) in enumerate(sizes)]
    return [indices_of(row) for item in items if (row := packer.add(item)) is not None]


def test_rows_of_a_seeded_stream():
    random = np.random.Generator(np.random.Philox(7)).random((120, 2))  # text, and groups of frames
    sizes = [(2 + int(text * 17), [int(groups * 4)] if groups > 0.3 else []) for text, groups in random]
    assert rows_of((40, 12), 3, sizes) == ROWS


def test_the_first_to_wait_begins_a_row_once_it_has_waited_for_eight_times_the_bins():
    small, large = (2, []), (20, [])
    rows = rows_of((20, 4), 1, [small] + [large] * 12)
    # The small one waits while rows of one large sample are filled; then it is late, and has a row to itself.
    assert rows[:9] == [[1], [2], [3], [4], [5], [6], [7], [8], [0]]


@pytest.mark.parametrize(
    ("needs", "limits", "first", "chosen"),
    [
        ([[5, 0], [5, 0], [4, 0], [3, 0]], (12, 9), 0, [0, 2, 3]),  # 4 and 3 fill what is left, the second 5 would not
        ([[5, 0], [5, 0], [2, 0]], (12, 9), 0, [0, 1, 2]),
        ([[1, 4], [1, 3], [9, 1], [1, 1]], (40, 5), 0, [0, 2]),  # frames are full
        ([[6, 2]], (6, 2), 0, [0]),
        ([[6, 2], [1, 0]], (6, 2), 0, [0]),
        ([[6, 2], [0, 1]], (6, 2), 1, [1]),
        ([[2, 0]] * 6, (12, 0), 3, [3, 0, 1, 2, 4, 5]),
        ([[10, 0], [40, 0], [41, 0], [49, 0]], (100, 1), 0, [0, 2, 3]),  # 41 and 49 are all that is left
        ([[10, 0], [40, 0], [45, 0], [30, 0]], (100, 1), 0, [0, 2, 1]),
    ],
)
def test_which_samples_share_a_row(needs, limits, first, chosen):
    needs, limits = np.asarray(needs, np.int64), np.asarray(limits, np.int64)
    sizes = (needs / np.maximum(limits, 1)).sum(1)
    assert sorted(fill_row(needs, sizes, limits, first)) == sorted(chosen)
    assert fill_row(needs, sizes, limits, first)[0] == first


def test_a_sample_as_large_as_a_row_fits_and_a_larger_one_is_named():
    assert rows_of((8, 4), 0, [(8, [])]) == [[0]]
    for limits, (text, media) in (((7, 4), (8, [])), ((99, 2), (2, [2]))):
        with pytest.raises(UserError, match="sample 's0': .* tokens and . frames, but a row holds"):
            rows_of(limits, 0, [(text, media)])


def test_the_order_of_an_endless_shuffle():
    shuffle = EndlessShuffle(12, 3)
    assert [shuffle[i] for i in range(24)] == ORDER
