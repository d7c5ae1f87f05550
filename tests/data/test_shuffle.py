"""The order of the stream: every index once an epoch, another order each time, no index favoured."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kangaroo_jax.data.batches.shuffle import EndlessShuffle


@settings(deadline=None)
@given(n=st.integers(1, 300), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 10**6))
def test_an_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    shuffle = EndlessShuffle(n, seed)
    assert sorted(shuffle[epoch * n + i] for i in range(n)) == list(range(n))


@pytest.mark.parametrize("n", [5, 16, 100])
def test_orders_look_random(n: int) -> None:
    epochs = max(1000, 20_000 // n)
    shuffle = EndlessShuffle(n, 3)
    orders = np.array([[shuffle[epoch * n + i] for i in range(n)] for epoch in range(epochs)])
    for place in (0, n // 2, n - 1):  # each index is as likely at each place: chi-square, 5 sigma
        counts = np.bincount(orders[:, place], minlength=n)
        chi = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
        assert abs(chi - (n - 1)) < 5 * np.sqrt(2 * (n - 1)) + 5
    followers = ((orders[:, 1:] - orders[:, :-1]) == 1).mean()  # i+1 follows i once in n
    assert abs(followers - 1 / n) < 0.25 / n


def test_seed_epoch_and_large_n() -> None:
    first, again, other = EndlessShuffle(1000, 1), EndlessShuffle(1000, 1), EndlessShuffle(1000, 2)
    order = [first[i] for i in range(1000)]
    assert order == [again[i] for i in range(1000)]
    assert order != [other[i] for i in range(1000)] and order != [first[1000 + i] for i in range(1000)]
    large = EndlessShuffle(10**12, 0)
    assert len({large[i] for i in range(1000)}) == 1000
