"""Slots and the host's memory against a plain model: a list of ids for each conversation."""

import numpy as np
import pytest

from kangaroo_jax.inference.memory import HostMemory, Identities, Saved, common_prefix, token_ids
from kangaroo_jax.inference.slots import WORTH_SHARING, Slots

TAIL, SPARE = 8, 8
CLASSES = ((104 + SPARE, 3), (400 + SPARE, 2))


class Lists:
    """A device of Python lists. What is used up may not be used again."""

    tail = TAIL

    def __init__(self) -> None:
        self.parts = 0
        self.copies = 0

    def empty(self, capacity):
        self.parts += 1
        return [None] * capacity

    def empty_tail(self):
        return [None] * TAIL

    def copy(self, into, large, capacity):
        assert len(into) == capacity and into is not large
        self.copies += 1
        result = (large + into[len(large) :])[:capacity]
        into.clear()
        return result

    def flush(self, large, tail, filled):
        assert filled + TAIL <= len(large)
        result = large[:filled] + tail + large[filled + TAIL :]
        large.clear()
        return result

    def save(self, large, count):
        return large[:count], count

    def size(self, count):
        return count

    def restore(self, content, capacity):
        self.parts += 1
        return (content + [None] * capacity)[:capacity]


def remembered(slot) -> list:
    """What the slot's arrays hold."""
    if not slot.length:
        return []
    return slot.large.content[: slot.filled] + (slot.tail[: slot.in_tail] if slot.in_tail else [])


def extend(slots: Slots, slot, ids) -> None:
    """Read a piece of a prompt, as the engine does: into a part that is used up, and behind it garbage."""
    large = slots.writable(slot)
    n = len(ids)
    assert slot.filled + n <= len(large.content)
    part = large.content[: slot.filled] + list(ids) + large.content[slot.filled + n :]
    large.content.clear()
    large.content = part
    slot.filled += n


def read_token(slots: Slots, slot, token) -> None:
    slots.ready_for_token(slot)
    slot.tail = [*slot.tail[: slot.in_tail], token, *slot.tail[slot.in_tail + 1 :]]
    slot.in_tail += 1


@pytest.mark.parametrize("host_bytes", [0, 700])
@pytest.mark.parametrize("seed", range(6))
def test_whatever_comes_a_slot_holds_its_own_conversation(seed, host_bytes):
    rng = np.random.default_rng(seed)
    device = Lists()
    slots = Slots(device, CLASSES, spare=SPARE, host=HostMemory(host_bytes))
    films = [rng.integers(0, 1 << 40, 120).astype(np.uint64) for _ in range(3)]
    over: list[tuple[bytes, list]] = []
    busy: list[tuple] = []  # slot, namespace, its ids so far, how many it will have
    reused = 0
    for _ in range(300):
        if rng.random() < 0.4:
            namespace = (b"", b"other")[rng.integers(2)]
            own = [ids for name, ids in over if name == namespace]
            begin = own[rng.integers(len(own))] if own and rng.random() < 0.5 else films[rng.integers(3)]
            ids = np.array(
                [*begin[: rng.integers(1, len(begin) + 1)], *rng.integers(0, 9, rng.integers(1, 30))], np.uint64
            )
            need = len(ids) + int(rng.integers(0, 40))
            if need > slots.room:
                continue
            found = slots.place(namespace, ids, need)
            idle = [slot for slot in slots.slots if not slot.busy and slot.room >= need]
            if found is None:
                assert not idle
                continue
            slot, count = found
            assert slot.busy and slot.room >= need and remembered(slot) == ids[:count].tolist()
            assert count == slot.filled and slot.in_tail == 0
            reused += count > 0
            assert not count or any(
                name == namespace and common_prefix(np.array(had, np.uint64), ids) >= count
                for name, had in over + [(b[1], b[2]) for b in busy]
            )
            rest = ids[count:]
            for start in range(0, len(rest), 16):
                extend(slots, slot, rest[start : start + 16].tolist())
            busy.append((slot, namespace, ids.tolist(), need))
        elif busy:
            place = int(rng.integers(len(busy)))
            slot, namespace, ids, need = busy[place]
            for token in rng.integers(0, 9, min(need - len(ids), int(rng.integers(1, 20)))).tolist():
                read_token(slots, slot, token)
                ids.append(token)
            if rng.random() < 0.5:
                busy.pop(place)
                if rng.random() < 0.1:
                    slots.reset(slot)
                    assert not slot.length and not slot.busy
                else:
                    slots.finish(slot, np.array(ids, np.uint64))
                    over.append((namespace, ids))
        for slot, _, ids, _ in busy:
            assert remembered(slot) == ids
        for slot in slots.slots:
            if not slot.busy:
                assert remembered(slot) == slot.ids.tolist()
        held = {id(slot.large): slot.large for slot in slots.slots if slot.large is not None}
        for large in held.values():
            assert large.users == sum(slot.large is large for slot in slots.slots)
        assert slots._host.bytes <= host_bytes
    assert reused > 15
    assert sum(slots.counts().values()) == 5 and sum(slots.used().values()) == slots.counts()["busy"]


def placed(slots, ids, namespace=b"", need=None):
    slot, count = slots.place(namespace, np.asarray(ids, np.uint64), need or len(ids))
    extend(slots, slot, list(ids)[count:])
    return slot, count


@pytest.fixture
def slots():
    return Slots(Lists(), CLASSES, spare=SPARE, host=HostMemory(1000))


FILM = list(range(1000, 1000 + 90))


def test_a_conversation_goes_on_in_its_own_slot(slots):
    slot, _ = placed(slots, FILM)
    for token in (1, 2, 3):
        read_token(slots, slot, token)
    slots.finish(slot, np.array([*FILM, 1, 2, 3], np.uint64))
    again, count = placed(slots, [*FILM, 1, 2, 3, 9, 9])
    assert again is slot and count == 93 and slots._device.copies == 0


def test_a_prefix_is_shared_until_one_of_them_writes(slots):
    first, _ = placed(slots, FILM)
    other, count = slots.place(b"", np.array([*FILM, 7], np.uint64), 95)
    assert count == 90 and other.large is first.large and first.large.users == 2 and slots._device.copies == 0
    extend(slots, other, [7])
    assert other.large is not first.large and slots._device.copies == 1 and remembered(first) == FILM
    assert remembered(other) == [*FILM, 7]


def test_the_least_recently_used_gives_way_and_comes_back_from_the_host(slots):
    films = [[1000 * n + i for i in range(90)] for n in range(1, 5)]
    for film in films[:3]:
        slot, _ = placed(slots, film)
        slots.finish(slot, np.array(film, np.uint64))
    slot, count = placed(slots, films[3])
    assert count == 0 and slot is slots.slots[0] and len(slots._host) == 1
    slots.finish(slot, np.array(films[3], np.uint64))
    slot, count = placed(slots, [*films[0], 5])
    assert count == 90 and slot is slots.slots[1]
    assert placed(slots, [*films[0], 6], namespace=b"another")[1] == 0


def test_a_short_beginning_is_not_worth_a_copy(slots):
    placed(slots, FILM)
    assert placed(slots, FILM[: WORTH_SHARING - 1])[1] == 0


def test_what_is_shared_across_classes_is_copied(slots):
    first, _ = placed(slots, FILM)
    large, count = placed(slots, [*FILM, *range(200)])
    assert large.capacity == 408 and count == 90 and large.large is not first.large


def test_ids_of_vision_tokens_are_of_their_medium_and_row():
    numbers = Identities()
    tokens = np.array([5, 10, 10, 6, 10], np.int32)
    is_vision = tokens == 10
    a, b = numbers.number(b"a"), numbers.number(b"b")
    assert a == numbers.number(b"a") != b
    one, same = (token_ids(tokens, is_vision, [(a, 2), (b, 1)]) for _ in range(2))
    other = token_ids(tokens, is_vision, [(a, 2), (a, 1)])
    assert common_prefix(one, same) == 5 and common_prefix(one, other) == 4 and len(set(one.tolist())) == 5
    assert (one[is_vision] >> np.uint64(63)).all() and one[0] == 5
    with pytest.raises(ValueError, match="3 vision tokens in the prompt, 2 in its media"):
        token_ids(tokens, is_vision, [(a, 2)])


def test_the_hosts_memory_is_bounded_and_keeps_the_longest():
    host = HostMemory(100)

    def save(ids, size):
        host.put(Saved(b"", np.array(ids, np.uint64), ids, size))

    save([1, 2], 40)
    save([1, 2, 3], 50)  # goes on from the first
    assert len(host) == 1 and host.bytes == 50 and host.holds(b"", np.array([1, 2], np.uint64))
    save([7], 40)
    save([1], 101)
    assert len(host) == 2 and host.bytes == 90
    assert host.holds(b"", np.array([1], np.uint64))  # it was used now
    save([8], 30)
    assert host.find(b"", np.array([7], np.uint64)) == (None, 0) and host.bytes == 80
    assert host.find(b"x", np.array([1, 2, 3], np.uint64)) == (None, 0)


def test_of_a_prompt_that_is_being_read_only_what_is_read_is_shared(slots):
    first, _ = slots.place(b"", np.array(FILM, np.uint64), 95)
    extend(slots, first, FILM[:70])
    other, count = slots.place(b"", np.array(FILM, np.uint64), 95)
    assert count == 70 and other is not first and remembered(other) == FILM[:70]


def test_what_is_in_a_tail_is_shared_too(slots):
    first, _ = placed(slots, FILM)
    for token in (1, 2, 3):
        read_token(slots, first, token)
    slots.finish(first, np.array([*FILM, 1, 2, 3], np.uint64))
    larger, count = slots.place(b"", np.array([*FILM, 1, 2, 3, 4], np.uint64), 200)
    assert count == 93 and remembered(larger) == remembered(first) == [*FILM, 1, 2, 3]
