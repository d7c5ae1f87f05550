"""Who is next: requests that wait for a slot, those whose prompt is being read, those that are being answered."""

from collections.abc import Callable

from kangaroo_jax.inference.memory import Identities, common_prefix, token_ids
from kangaroo_jax.inference.running import Run
from kangaroo_jax.inference.slots import WORTH_SHARING, Slots
from kangaroo_jax.inference.turns import Turns


class Queue:
    """Requests by how far they are. Owners take turns at slots, and at the reading of prompts.

    Of one owner's requests the first come is first served. One that waits for a large slot holds up none that fits in
    a small one.
    """

    def __init__(self, slots: Slots, identities: Identities) -> None:
        self._slots, self._identities = slots, identities
        self._placing, self._reading = Turns(), Turns()
        self.waiting: list[Run] = []
        self.prefilling: list[Run] = []
        self.running: list[Run] = []

    def everybody(self) -> list[Run]:
        """All of them."""
        return [*self.waiting, *self.prefilling, *self.running]

    def answer(self, run: Run) -> None:
        """The prompt of a request is read."""
        self.prefilling.remove(run)
        self.running.append(run)

    def remove(self, run: Run) -> None:
        """A request is over."""
        for runs in (self.waiting, self.prefilling, self.running):
            if run in runs:
                runs.remove(run)

    def place(self, fail: Callable[[Run, Exception], None]) -> list[Run]:
        """Give slots to those who wait, as far as there are any; `fail` ends a request whose media do not fit."""
        placed = []
        for run in self._placing.ordered(self.waiting, _owner):
            if run.ids is None and not self._identify(run, fail):
                continue
            if not self._is_being_read(run) and self._place(run):
                placed.append(run)
                self._placing.served(_owner(run))
        return placed

    def to_read(self) -> list[Run]:
        """Those whose prompt is being read, in the order in which a piece of one should be."""
        return self._reading.ordered(self.prefilling, _owner)

    def read(self, run: Run) -> None:
        """A piece of its prompt is being read."""
        self._reading.served(_owner(run))

    def _identify(self, run: Run, fail: Callable[[Run, Exception], None]) -> bool:
        """Find the ids of a prompt's tokens, if its media are known."""
        media = [(watched.identity, watched.rows) for watched in run.watched]
        if any(identity is None for identity, _ in media):
            return False
        numbers = [(self._identities.number(identity), rows) for identity, rows in media if identity is not None]
        try:
            run.ids = token_ids(run.request.tokens, run.request.is_vision, numbers)
        except ValueError as error:
            fail(run, error)
        return run.ids is not None

    def _place(self, run: Run) -> bool:
        assert run.ids is not None
        found = self._slots.place(run.request.namespace, run.ids[:-1], run.need)
        if found is None:
            return False
        slot, cached = found
        slot.ids = run.ids
        run.place(slot, cached)
        self.waiting.remove(run)
        self.prefilling.append(run)
        return True

    def _is_being_read(self, run: Run) -> bool:
        """Whether much of a prompt is just being read for another request: it is worth waiting for."""
        assert run.ids is not None
        shared = [
            common_prefix(other.ids[:-1], run.ids[:-1])
            for other in self.prefilling
            if other.ids is not None and other.request.namespace == run.request.namespace and other.left()
        ]
        longest = max(shared, default=0)
        return longest >= WORTH_SHARING and longest > self._slots.likely(run.request.namespace, run.ids[:-1])


def _owner(run: Run) -> tuple[bytes]:
    return (run.request.owner,)
