"""The engine: many conversations at a time through one model, by one thread that owns the device.

Between two steps of those that are being answered at most one piece of a prompt is read, so that nobody waits long
for the next token. A step's tokens stay on the device for the next one, and are read while that runs.
"""

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.given import Given
from kangaroo_jax.inference.memory import HostMemory, Identities
from kangaroo_jax.inference.programs import Programs
from kangaroo_jax.inference.requests import Answer, EngineError, Request, Ticket
from kangaroo_jax.inference.running import Detokenizer, Run, Step
from kangaroo_jax.inference.sampling import Choices, Sampling, seen_in_prompt
from kangaroo_jax.inference.scheduling import Queue
from kangaroo_jax.inference.sizes import Sizes
from kangaroo_jax.inference.slots import Slots
from kangaroo_jax.inference.timing import Finishes
from kangaroo_jax.inference.vision import Vision
from kangaroo_jax.models.kangaroo import KangarooModel
from kangaroo_jax.system.progress import Tell, silent

FAILURES = 2  # so many one after another end the engine
AHEAD = 2  # pieces of prompts that may wait on the device
BEGUN = 16  # last tokens of an answer that was begun which say how its text goes on


class _Ended(Exception):
    """The engine cannot go on."""


class Engine:
    """Answers requests; a context manager, which closes it.

    Attributes:
        programs: what is compiled.
        failed: why it has ended by itself, None while it has not.
    """

    def __init__(
        self,
        model: KangarooModel,
        sizes: Sizes,
        *,
        vision: Callable[[Programs], Vision | Given] | None = None,
        detokenizer: Callable[[tuple[str, ...]], Detokenizer] | None = None,
        host_bytes: int = 0,
        mesh: Mesh | None = None,
        precision: str | None = None,
        kv_dtype: str | None = None,
    ) -> None:
        """Starts its thread; nothing is compiled before it is needed, or `warm_up` is called.

        Args:
            model: with unstacked layers (`KangarooModel.unstack`).
            sizes: slots and programs.
            vision: makes what looks at media; without it prompts are text alone.
            detokenizer: makes what turns tokens into text, given the stop strings; without it there is no text.
            host_bytes: of the host's memory for conversations that have lost their slot.
            mesh: over which the weights and memories are cut.
            precision: of matrix products, as `jax.default_matmul_precision` has it.
            kv_dtype: of what is remembered; int8, or None as it is computed.

        Raises:
            UserError: `kv_dtype` is none of these.
        """
        self.programs = Programs(model, sizes, mesh=mesh, precision=precision, kv_dtype=kv_dtype)
        self.failed: str | None = None
        self._vision = vision(self.programs) if vision is not None else None
        self._detokenizer = detokenizer
        self._host = HostMemory(host_bytes)
        self._slots = Slots(self.programs, sizes.classes, spare=sizes.spare, host=self._host)
        self._queue = Queue(self._slots, Identities())
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._new: list[Run] = []
        self._forgetting: threading.Event | None = None  # set when all is forgotten
        self._closing: float | None = None  # when what is under way is given up
        self._awake = threading.Event()
        self._under_way: Step | None = None
        self._last = self.programs.no_tokens()
        self._choices: tuple[tuple[Run | None, ...], Choices] | None = None
        self._spares: list[tuple[Any, Any]] = []  # tails and what was seen, for rows that nobody has
        self._markers: list[tuple[Run, Any]] = []
        self._finishes = Finishes()
        self._failures = 0
        if self._vision is not None:
            self._vision.listener = self._awake.set
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -------------------------------------------------------------------------------- for any thread

    def submit(self, request: Request) -> Ticket:
        """Take a request in; its ticket tells what becomes of it.

        Raises:
            UserError: the prompt is longer than the largest slot, or has media where none can be looked at.
            EngineError: the engine is closed or has failed.
        """
        room = self._slots.room
        scored = 0 if request.continuation is None else len(request.continuation)
        if len(request.tokens) + scored > room:
            raise UserError(
                f"the prompt has {len(request.tokens) + scored} tokens, but a conversation may have {room} here: "
                "shorten it, take fewer frames, or make the slots larger"
            )
        if request.media and self._vision is None:
            raise UserError("the prompt has media, and this engine looks at none")
        if not all(0 <= token < self.programs.vocabulary for token, _ in request.sampling.bias):
            raise UserError(f"bias: ids of tokens must be between 0 and {self.programs.vocabulary - 1}")
        ticket = Ticket(request, self._awake.set)
        detokenizer = self._detokenizer(request.stop) if self._detokenizer is not None else None
        if detokenizer is not None and request.begun:
            detokenizer.follow(request.tokens[-BEGUN:].tolist())
        run = Run(ticket, request, detokenizer, room)
        with self._lock:
            if self._closing is not None or self.failed:
                raise EngineError(self.failed or "the engine is closed")
            if self._vision is not None:
                run.watched = [self._vision.watch(ref, request.namespace, request.owner) for ref in request.media]
                ticket.media = run.watched
            self._new.append(run)
        self._awake.set()
        return ticket

    def warm_up(self, image_size: int, tell: Tell = silent) -> int:
        """Compile all programs, for frames of `image_size` pixels; how many there are. `tell`: how far it is."""
        self.programs.warm_up(image_size, tell)
        return self.programs.compiled

    def forget(self) -> None:
        """Wait until nothing is under way; then no conversation, medium or count is left of what was asked until now.

        Raises EngineError where the engine ends before.
        """
        done = threading.Event()
        with self._lock:
            self._forgetting = done
        self._awake.set()
        while not done.wait(0.1):
            if not self._thread.is_alive():
                raise EngineError(self.failed or "the engine is closed")

    def stats(self) -> dict[str, int]:
        """Counts since the beginning, and what there is now.

        `tokens_prefilled`, `tokens_cached` (of prompts) and `tokens_generated`; `steps`; `programs_compiled`; requests
        `waiting`, `prefilling` and `running`, and those that ended by `requests_REASON`; slots by `slots_STATE`, and
        the busy ones by `used_ROOM`, the tokens that a conversation may have there; `host_bytes` and
        `host_conversations`; and what `Vision.stats` counts.
        """
        queue = self._queue
        now = {
            "waiting": len(self._new) + len(queue.waiting),
            "prefilling": len(queue.prefilling),
            "running": len(queue.running),
            "programs_compiled": self.programs.compiled,
            "host_bytes": self._host.bytes,
            "host_conversations": len(self._host),
        }
        names = ("tokens_prefilled", "tokens_cached", "tokens_generated", "steps", "requests")
        counts = {name: self._counts[name] for name in names} | dict(self._counts)
        slots = {f"slots_{name}": count for name, count in self._slots.counts().items()}
        slots |= {f"used_{room}": count for room, count in self._slots.used().items()}
        return counts | now | slots | (self._vision.stats() if self._vision is not None else {})

    def close(self, drain: float = 0.0) -> None:
        """Take nothing in any more, let what is under way end for `drain` seconds, and give up the rest."""
        with self._lock:
            self._closing = time.monotonic() + drain
        self._awake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # ----------------------------------------------------------------------------- the engine's thread

    def _work(self) -> None:
        reason = "the engine is closed"
        try:
            while not self._is_over():
                self._awake.clear()
                if not self._turn():
                    wait = None if self._closing is None else max(0.0, self._closing - time.monotonic())
                    if not self._is_over():
                        self._awake.wait(wait)
        except _Ended as error:
            reason = f"the engine has ended: {error}"
        except Exception as error:  # whatever it is, nobody may wait for ever
            reason = f"the engine has ended: {type(error).__name__}: {error}"
        with self._lock:
            self.failed = reason
            left = [*self._new, *self._queue.everybody()]
            self._new = []
        for run in left:
            self._leave(run)
            run.ticket.tell(EngineError(reason))
        self._finishes.close()
        if self._vision is not None:
            self._vision.close()

    def _is_over(self) -> bool:
        if self._closing is None:
            return False
        return time.monotonic() >= self._closing or not (self._new or self._queue.everybody())

    def _turn(self) -> bool:
        """Do what can be done now, a little of each; False where nothing can."""
        with self._lock:
            new, self._new = self._new, []
            if self._forgetting is not None and not (new or self._queue.everybody()):
                self._forget()
                self._forgetting.set()
                self._forgetting = None
        self._counts["requests"] += len(new)
        self._queue.waiting += new
        self._drop()
        placed = self._queue.place(self._fail)
        for run in placed:
            self._counts["tokens_cached"] += run.usage.cached_tokens
        stepped = self._step()
        read = self._read_piece()
        looked = self._vision is not None and self._vision.pump()
        return bool(new or placed or stepped or read or looked)

    def _forget(self) -> None:
        self._slots.forget()
        self._host.clear()
        if self._vision is not None:
            self._vision.forget()
        self._counts.clear()

    def _drop(self) -> None:
        """End requests that were cancelled, whose media cannot be read, or whose grammar ends or cannot be followed."""
        for run in self._queue.everybody():
            running = run in self._queue.running
            error = run.follow(self._awake.set) if running else run.medium_error()
            if run.ticket.cancelled or run.at_end:
                self._end(run, "cancelled" if run.ticket.cancelled else "stop")
            elif error is not None:
                self._fail(run, error)

    # ------------------------------------------------------------------------------------- prompts

    def _read_piece(self) -> bool:
        """Read a piece of the first prompt of which one is there, or score a piece; False where there is none."""
        self._settle(AHEAD)
        for run in self._queue.to_read():
            if run.left() and not run.piece_ready(self.programs.sizes):
                continue
            self._queue.read(run)
            self._guarded([run], functools.partial(self._extend if run.left() else self._score, run))
            return True
        self._settle(0)
        return False

    def _extend(self, run: Run) -> None:
        slot = run.slot
        assert slot is not None
        tokens, vision = run.piece(self.programs.sizes, self.programs.width, self.programs.dtype)
        large = self._slots.writable(slot)
        large.content, marker = self.programs.extend(large.content, tokens, vision, slot.filled)
        slot.filled += len(tokens)
        self._counts["tokens_prefilled"] += len(tokens)
        self._markers.append((run, marker))
        if not run.left():
            self._finishes.of(marker, run.prompt_read)
            if run.request.continuation is None:
                self._queue.answer(run)

    def _score(self, run: Run) -> None:
        """Read a piece of a continuation, and how likely its tokens are."""
        slot, continuation = run.slot, run.request.continuation
        if continuation is None:  # all but the last token of the prompt was remembered
            self._queue.answer(run)
            return
        assert slot is not None
        done = len(run.chosen)
        fed = np.concatenate([run.request.tokens[-1:], continuation[:-1]])[done : done + self.programs.sizes.chunks[0]]
        following = continuation[done : done + len(fed)]
        large = self._slots.writable(slot)
        large.content, found = self.programs.score(large.content, fed.astype(np.int32), slot.filled, following)
        slot.filled += len(fed)
        run.scored(following, [np.asarray(array) for array in found])
        self._failures = 0
        if len(run.chosen) == len(continuation):
            self._end(run, "length")

    def _settle(self, ahead: int) -> None:
        """Wait until no more than `ahead` pieces of prompts are on their way."""
        while len(self._markers) > ahead:
            run, marker = self._markers.pop(0)
            self._guarded([run], functools.partial(self._wait_for, marker))

    def _wait_for(self, marker: Any) -> None:
        jax.block_until_ready(marker)
        self._failures = 0

    # ------------------------------------------------------------------------------------- answers

    def _step(self) -> bool:
        """Let every conversation read a token, then see what the step before chose."""
        before, self._under_way = self._under_way, None
        wanted = tuple(run for run in self._queue.running if run.may_step())
        if wanted:
            self._under_way = self._guarded(wanted, lambda: self._dispatch(wanted))
        if before is not None:
            still = [run for run in before.rows if run is not None and not run.ended]
            self._guarded(still, lambda: self._see(before))
        return bool(wanted or before)

    def _rows_of(self, runs: tuple[Run, ...]) -> tuple[tuple[Run | None, ...], list[Any]]:
        """The rows of a step, by classes, and the large part that each reads."""
        by_class: dict[int, list[tuple[Run, Any]]] = {capacity: [] for capacity, _ in self.programs.sizes.classes}
        for run in runs:
            assert run.slot is not None
            self._slots.ready_for_token(run.slot)
            by_class[run.slot.capacity].append((run, run.slot.large))
        rows: list[Run | None] = []
        larges: list[Any] = []
        for capacity, count in self.programs.sizes.step({capacity: len(there) for capacity, there in by_class.items()}):
            there = by_class[capacity]
            nobody = count - len(there)
            rows += [*(run for run, _ in there), *[None] * nobody]
            larges += [large.content for _, large in [*there, *there[:1] * nobody]]
        return tuple(rows), larges

    def _dispatch(self, runs: tuple[Run, ...]) -> Step:
        programs = self.programs
        rows, larges = self._rows_of(runs)
        while len(self._spares) < rows.count(None):
            self._spares.append((programs.empty_tail(), programs.nothing_seen()))
        numbers = np.zeros((5, len(rows)), np.int32)
        numbers[0] = -1
        spares, self._spares = self._spares, []  # used up
        held, allowed = [], {}
        for row, run in enumerate(rows):
            if run is None:
                held.append(spares.pop())
                continue
            slot = run.slot
            assert slot is not None
            if run.seen is None:
                penalised = run.request.sampling.penalises
                text = run.request.tokens[~run.request.is_vision]
                run.seen = programs.nothing_seen(seen_in_prompt(text, programs.vocabulary) if penalised else None)
            numbers[:, row] = *run.fed(), slot.filled, slot.in_tail, run.dispatched
            held.append((slot.tail, run.seen))
            if run.allowed is not None:
                allowed[row], run.allowed = run.allowed, None
        tails, seen = zip(*held, strict=True)
        chosen, tails, seen = programs.decode(larges, tails, seen, self._last, numbers, self._choices_of(rows), allowed)
        for row, run in enumerate(rows):
            if run is None:
                spares.append((tails[row], seen[row]))
                continue
            assert run.slot is not None
            run.slot.tail, run.seen, run.row = tails[row], seen[row], row
            run.slot.in_tail += 1
            run.dispatched += 1
        self._spares = spares
        self._last = chosen.tokens
        chosen.tokens.copy_to_host_async()
        self._counts["steps"] += 1
        return Step(rows, chosen)

    def _choices_of(self, rows: tuple[Run | None, ...]) -> Choices:
        """The settings of a step's rows, sent to the device when the rows change."""
        if self._choices is None or self._choices[0] != rows:
            samplings = [Sampling() if run is None else run.request.sampling for run in rows]
            wants = [run is not None and run.request.logprobs is not None for run in rows]
            guided = [run is not None and run.guide is not None for run in rows]
            choices = self.programs.choices(Choices.of(samplings, wants, guided, self.programs.vocabulary))
            self._choices = rows, choices
        return self._choices[1]

    def _see(self, step: Step) -> None:
        """Hand on the tokens that a step chose."""
        tokens = np.asarray(step.chosen.tokens)
        logprobs: Sequence[np.ndarray] | None = None
        if any(run is not None and run.request.logprobs is not None for run in step.rows):
            logprobs = [np.asarray(x) for x in (step.chosen.logprobs, step.chosen.best, step.chosen.best_logprobs)]
        self._failures = 0
        for row, run in enumerate(step.rows):
            if run is not None and not run.ended:
                self._counts["tokens_generated"] += 1
                reason = run.token(int(tokens[row]), None if logprobs is None else [x[row] for x in logprobs])
                if reason is not None:
                    self._end(run, reason)

    # ----------------------------------------------------------------------------------------- ends

    def _guarded(self, runs: Sequence[Run], work: Callable[[], Any]) -> Any:
        """What `work` returns; None where it fails, with the requests of `runs`. Raises _Ended after several."""
        try:
            return work()
        except UserError as error:
            for run in runs:
                self._fail(run, error)
        except Exception as error:
            self._failures += 1
            for run in runs:
                self._fail(run, EngineError(f"{type(error).__name__}: {error}"))
            if self._failures >= FAILURES:
                raise _Ended(f"{type(error).__name__}: {error}") from error
        return None

    def _end(self, run: Run, reason: str) -> None:
        """A request is done: what its slot remembers stays."""
        answer: Answer = run.answer(reason)
        if run.slot is not None:
            self._slots.finish(run.slot, run.remembered())
            run.slot = None
        self._leave(run)
        self._counts[f"requests_{reason}"] += 1
        run.ticket.tell(answer)

    def _fail(self, run: Run, error: Exception) -> None:
        """A request is lost: its slot is trusted no more."""
        if run.ended:
            return
        if run.slot is not None:
            self._slots.reset(run.slot)
            run.slot = None
        self._leave(run)
        self._counts["requests_bad" if isinstance(error, UserError) else "requests_failed"] += 1
        run.ticket.tell(error)

    def _leave(self, run: Run) -> None:
        run.ended, run.seen = True, None
        self._queue.remove(run)
        for watched in run.watched:
            watched.release()
