"""Owners take turns: at slots, at the reading of prompts, and at every part of looking at media."""

import numpy as np
import pytest
from flax import nnx

from kangaroo_jax.inference.engine import Engine
from kangaroo_jax.inference.requests import Answer, Request
from kangaroo_jax.inference.sizes import Sizes
from kangaroo_jax.inference.turns import Turns

SIZES = Sizes(((128, 1), (512, 1)), chunks=(32,), visible=(), rows=(1,), frames=4)


def test_the_first_of_each_comes_before_the_second_of_any():
    turns = Turns()
    waiting = ["a1", "a2", "a3", "b1", "c1", "b2"]

    def order() -> list[str]:
        return turns.ordered(waiting, lambda item: (item[0].encode(),))

    assert order() == ["a1", "b1", "c1", "a2", "b2", "a3"]
    turns.served((b"a",))
    assert order() == ["b1", "c1", "a1", "b2", "a2", "a3"]
    turns.served((b"b",))
    assert order() == ["c1", "a1", "b1", "a2", "b2", "a3"]
    assert Turns().ordered(waiting, lambda _: (b"",)) == waiting


def test_what_several_want_is_done_in_the_turn_of_the_first():
    owners = {"a1": {b"a"}, "a2": {b"a"}, "ab": {b"a", b"b"}, "b1": {b"b"}}
    found = Turns().ordered(list(owners), lambda item: owners[item])
    assert found == ["a1", "ab", "a2", "b1"]


@pytest.fixture
def engine(make_micro_config, make_random_model):
    with Engine(nnx.clone(make_random_model(make_micro_config().model)).unstack(), SIZES) as engine:
        yield engine


def asked(seed: int, owner: bytes, length: int = 20, new: int = 8) -> Request:
    tokens = np.random.default_rng(seed).integers(11, 400, length).astype(np.int32)
    return Request(tokens, np.zeros(length, bool), (), new, namespace=owner, owner=owner)


def order_of(engine: Engine, requests: list[Request], busy: bool = True) -> list[int]:
    """The order in which requests are answered that are there at the same time; `busy`: while no slot is free."""
    done: list[int] = []
    if busy:
        held = [engine.submit(asked(90 + number, b"x", length, 20)) for number, length in enumerate((20, 300))]
        for ticket in held:
            next(iter(ticket))
    tickets = [engine.submit(request) for request in requests]
    for number, ticket in enumerate(tickets):
        ticket.add_listener(
            lambda told, number=number: done.append(number) if isinstance(told, Answer) else None  # type: ignore[misc]
        )
    for ticket in tickets:
        ticket.result(60)
    return done


def test_who_asks_much_does_not_hold_up_who_asks_little(engine):
    order = order_of(engine, [*(asked(seed, b"a") for seed in range(12)), asked(50, b"b"), asked(51, b"b")])
    assert order.index(12) <= 3 and order.index(13) <= 5


def test_who_waits_for_a_large_slot_holds_up_nobody_who_fits_in_a_small_one(engine):
    order = order_of(engine, [asked(1, b"a", 300, 60), asked(2, b"a", 301, 60), asked(3, b"a"), asked(4, b"a")])
    assert order == [2, 3, 0, 1]


def test_prompts_are_read_in_turns(engine):
    assert order_of(engine, [asked(1, b"a", 440, 1), asked(2, b"b", 20, 1)], busy=False) == [1, 0]
