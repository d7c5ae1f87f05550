"""An engine without a model: says the same words to everybody, and remembers what it was asked."""

import threading
import time
from types import SimpleNamespace

from kangaroo_jax.data.media.video import probe_cached
from kangaroo_jax.inference.grammars import Grammars
from kangaroo_jax.inference.requests import Answer, Event, Logprob, Request, Ticket, Usage
from kangaroo_jax.serving.backend import Backend
from kangaroo_jax.serving.limits import Limits
from kangaroo_jax.serving.prompts import Prompts

CONTEXT = 2000


class FakeEngine:
    """Says `pieces`, one every `pause` seconds; where `go` is cleared, only once it is set."""

    def __init__(self, pieces: tuple[str, ...] = ("Hel", "lo ", "世界"), pause: float = 0.0) -> None:
        self.pieces, self.pause = pieces, pause
        self.go = threading.Event()
        self.go.set()
        self.tickets: list[Ticket] = []
        self.failed: str | None = None
        self.error: Exception | None = None  # what becomes of requests

    def submit(self, request: Request) -> Ticket:
        ticket = Ticket(request)
        self.tickets.append(ticket)
        threading.Thread(target=self._answer, args=(ticket,), daemon=True).start()
        return ticket

    def _answer(self, ticket: Ticket) -> None:
        request = ticket.request
        while not self.go.wait(0.01):
            if ticket.cancelled:
                break
        if self.error is not None:
            ticket.tell(self.error)
            return
        said: list[str] = []
        probability = (
            None if request.logprobs is None else Logprob(5, -0.5, ((5, -0.5), (7, -float("inf")))[: request.logprobs])
        )
        for piece in self.pieces[: request.max_new_tokens]:
            time.sleep(self.pause)
            if ticket.cancelled:
                break
            said.append(piece)
            ticket.tell(Event(piece, (5,), () if probability is None else (probability,)))
        usage = Usage(
            prompt_tokens=len(request.tokens),
            cached_tokens=3,
            completion_tokens=len(said),
            frames_decoded=sum(len(ref.times) for ref in request.media),
            first_token=0.01,
            total=0.02,
            frame_times=tuple(ref.times for ref in request.media),
        )
        reason = "cancelled" if ticket.cancelled else "stop" if len(said) == len(self.pieces) else "length"
        probabilities = () if probability is None else (probability,) * len(said)
        ticket.tell(Answer("".join(said), (5,) * len(said), probabilities, reason, usage))

    def stats(self) -> dict[str, int]:
        running = sum(not ticket.done for ticket in self.tickets)
        slots = {"slots_busy": running, "slots_empty": 2, "used_384": running}
        return {"running": running, "tokens_generated": 7, "programs_compiled": 13} | slots

    def close(self) -> None:
        """Nothing runs."""


def fake_backend(engine: FakeEngine, tokenizer, config, limits: Limits) -> Backend:
    """A backend around it; `config` is `config.data`."""
    decoder = SimpleNamespace(replaced=2, close=lambda: None)
    prompts = Prompts(tokenizer, config, 2, 3, probe_cached, limits)
    return Backend(engine, tokenizer, prompts, CONTEXT, decoder, Grammars(tokenizer, tokenizer.vocab_size))  # type: ignore[arg-type]
