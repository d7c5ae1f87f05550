"""Slots: which conversation's memory is where, who shares it, and what gives way. The device is a parameter.

A slot has a large part, which several may share until one of them writes it, and a tail of its own. A finished
conversation stays in its slot until the slot is needed: what a later prompt has in common with it is not read again.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from kangaroo_jax.inference.memory import HostMemory, Saved, common_prefix

WORTH_SHARING = 64  # tokens; fewer are read again rather than copied from another conversation
SHORT = 256  # tokens of a finished conversation that another may overwrite, rather than take a slot of its own


class Device(Protocol):
    """What holds memories: large parts for a number of tokens, and tails. A part is `Any` to the slots."""

    tail: int  # tokens of a tail

    def empty(self, capacity: int) -> Any:
        """A new large part."""

    def empty_tail(self) -> Any:
        """A new tail."""

    def copy(self, into: Any, large: Any, capacity: int) -> Any:
        """`into`, of `capacity`, with what of `large` fits; `into` is used up."""

    def flush(self, large: Any, tail: Any, filled: int) -> Any:
        """`large` with the tail's tokens from place `filled` on; `large` is used up."""

    def save(self, large: Any, count: int) -> tuple[Any, int]:
        """The first `count` tokens on the host, and their bytes."""

    def size(self, count: int) -> int:
        """Bytes of so many tokens."""

    def restore(self, content: Any, capacity: int) -> Any:
        """A new large part with what `save` gave."""


@dataclasses.dataclass(eq=False)
class Large:
    """A large part, and how many slots hold it."""

    content: Any
    users: int = 1


@dataclasses.dataclass(eq=False)
class Slot:
    """Room for one conversation of up to `room` tokens."""

    number: int
    capacity: int  # tokens of the large part, some of which are never used
    room: int
    large: Large | None = None
    tail: Any = None
    namespace: bytes = b""
    ids: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros(0, np.uint64)
    )  # of all that is or will be known
    filled: int = 0  # tokens in the large part
    in_tail: int = 0
    busy: bool = False
    used: int = 0  # when it was used last

    @property
    def length(self) -> int:
        """Tokens that it remembers."""
        return self.filled + self.in_tail

    def known(self) -> np.ndarray:
        """Ids of tokens that another conversation may take over: of a busy one those that nothing changes any more."""
        return self.ids[: self.filled if self.busy else self.length]


class Slots:
    """All slots, in classes of equal capacity."""

    def __init__(self, device: Device, classes: Sequence[tuple[int, int]], *, spare: int, host: HostMemory) -> None:
        """`classes`: (capacity, slots) of each; `spare`: tokens at a large part's end that are never relied on."""
        self._device, self._host = device, host
        self._clock = itertools.count(1)
        self._idle_parts: dict[int, list[Any]] = {capacity: [] for capacity, _ in classes}
        capacities = [capacity for capacity, count in sorted(classes) for _ in range(count)]
        self.slots = [Slot(number, capacity, capacity - spare) for number, capacity in enumerate(capacities)]
        self.room = self.slots[-1].room  # of the largest

    # ------------------------------------------------------------------------------- coming and going

    def place(self, namespace: bytes, ids: np.ndarray, need: int) -> tuple[Slot, int] | None:
        """A slot with room for `need` tokens, and how many of `ids` it remembers; None where none is idle.

        The slot is busy from now on, and what it remembers of others is forgotten or saved.
        """
        fitting = [slot for slot in self.slots if not slot.busy and slot.room >= need]
        if not fitting:
            return None
        source, count = self._best(namespace, ids)
        saved, on_host = self._host.find(namespace, ids)
        if source is not None and source in fitting and on_host <= count + WORTH_SHARING:
            if source.length - count <= SHORT or len(fitting) == 1:
                return self._take_over(source, namespace, ids, count), count
        smallest = min(slot.capacity for slot in fitting)
        free = [slot for slot in fitting if slot.capacity == smallest]
        slot = min(free, key=lambda slot: (slot.length > 0, slot is source, slot.used))
        if slot is source:
            return self._take_over(slot, namespace, ids, count), count
        if saved is not None and on_host > count + WORTH_SHARING:
            count = on_host
            self._host.touch(saved)
            self._clear(slot)
            slot.large = Large(self._device.restore(saved.content, slot.capacity))
        elif source is not None and count >= WORTH_SHARING:
            if count > source.filled:
                self._flush(source)
            self._share(slot, source)
        else:
            count = 0
            self._clear(slot)
        self._begin(slot, namespace, ids, count)
        return slot, count

    def likely(self, namespace: bytes, ids: np.ndarray) -> int:
        """How many of `ids` are remembered somewhere."""
        return max(self._best(namespace, ids)[1], self._host.find(namespace, ids)[1])

    def finish(self, slot: Slot, ids: np.ndarray) -> None:
        """The conversation in a slot is over; `ids` of all tokens that it remembers."""
        slot.ids, slot.busy, slot.used = ids[: slot.length], False, next(self._clock)

    def reset(self, slot: Slot) -> None:
        """Forget what is in a slot, and trust nothing of its memory."""
        if slot.large is not None:
            slot.large.users -= 1
        slot.large = slot.tail = None
        slot.ids, slot.filled, slot.in_tail, slot.busy = slot.ids[:0], 0, 0, False

    def forget(self) -> None:
        """Forget what is in idle slots; their parts are for whoever comes."""
        for slot in self.slots:
            if not slot.busy:
                slot.ids, slot.filled, slot.in_tail = slot.ids[:0], 0, 0
                self._clear(slot)

    # ---------------------------------------------------------------------------------- for programs

    def writable(self, slot: Slot) -> Large:
        """The slot's large part for its use alone, copied where others share it."""
        if slot.large is None:
            slot.large = Large(self._part(slot.capacity))
        elif slot.large.users > 1:
            content = self._device.copy(self._part(slot.capacity), slot.large.content, slot.capacity)
            slot.large.users -= 1
            slot.large = Large(content)
        return slot.large

    def ready_for_token(self, slot: Slot) -> None:
        """Make room for one token in the slot's tail, and see to it that there are parts at all."""
        if slot.large is None:
            self.writable(slot)
        if slot.tail is None:
            slot.tail = self._device.empty_tail()
        if slot.in_tail == self._device.tail:
            self._flush(slot)

    def counts(self) -> dict[str, int]:
        """How many slots are busy, idle with something remembered, and empty."""
        busy = sum(slot.busy for slot in self.slots)
        idle = sum(not slot.busy and slot.length > 0 for slot in self.slots)
        return {"busy": busy, "remembering": idle, "empty": len(self.slots) - busy - idle}

    def used(self) -> dict[int, int]:
        """How many slots of each class are busy, by the tokens that a conversation may have there."""
        return {
            room: sum(slot.busy for slot in self.slots if slot.room == room)
            for room in sorted({slot.room for slot in self.slots})
        }

    # --------------------------------------------------------------------------------------- inside

    def _best(self, namespace: bytes, ids: np.ndarray) -> tuple[Slot | None, int]:
        """The slot with the longest prefix in common, idle ones before busy ones."""
        best: tuple[Slot | None, int] = (None, 0)
        for slot in sorted(self.slots, key=lambda slot: (slot.busy, -slot.used)):
            if slot.namespace == namespace and slot.length:
                count = common_prefix(slot.known(), ids)
                if count > best[1]:
                    best = slot, count
        return best

    def _take_over(self, slot: Slot, namespace: bytes, ids: np.ndarray, count: int) -> Slot:
        """Go on in a slot from its first `count` tokens."""
        if count > slot.filled:
            self._flush(slot)
        self._begin(slot, namespace, ids, count)
        return slot

    def _begin(self, slot: Slot, namespace: bytes, ids: np.ndarray, count: int) -> None:
        slot.namespace, slot.ids, slot.filled, slot.in_tail = namespace, ids, count, 0
        slot.busy, slot.used = True, next(self._clock)

    def _share(self, slot: Slot, source: Slot) -> None:
        """Let a slot remember what another does: by the same part where they are of one class, else by a copy."""
        assert source.large is not None
        part, same = source.large, source.capacity == slot.capacity
        part.users += 1  # while the slot is cleared
        self._clear(slot)
        if same:
            slot.large = part
            return
        slot.large = Large(self._device.copy(self._part(slot.capacity), part.content, slot.capacity))
        part.users -= 1

    def _clear(self, slot: Slot) -> None:
        """Give up what a slot remembers; the host's memory takes it where it has room."""
        if slot.length >= WORTH_SHARING and slot.large is not None and self._host.fits(self._device.size(slot.length)):
            if not self._host.holds(slot.namespace, slot.ids[: slot.length]):
                if slot.in_tail:
                    self._flush(slot)
                content, size = self._device.save(slot.large.content, slot.filled)
                self._host.put(Saved(slot.namespace, slot.ids[: slot.filled].copy(), content, size))
        if slot.large is not None:
            slot.large.users -= 1
            if not slot.large.users:
                self._idle_parts[slot.capacity].append(slot.large.content)
        slot.large, slot.ids, slot.filled, slot.in_tail = None, slot.ids[:0], 0, 0

    def _flush(self, slot: Slot) -> None:
        """Move a slot's tail into its large part."""
        if slot.in_tail:
            large = self.writable(slot)
            large.content = self._device.flush(large.content, slot.tail, slot.filled)
            slot.filled, slot.in_tail = slot.length, 0

    def _part(self, capacity: int) -> Any:
        """A large part that nobody uses."""
        parts = self._idle_parts[capacity]
        return parts.pop() if parts else self._device.empty(capacity)
