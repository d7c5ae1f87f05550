"""Asks a model in this process: each video is decoded, looked at and read once, and each answer stored as it comes."""

import collections
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.marking import MEDIA, REQUEST
from kangaroo_jax.evaluation.prompting import Prompt, Prompts, Task
from kangaroo_jax.evaluation.samples import Row, Samples
from kangaroo_jax.inference.chat import Kangaroo
from kangaroo_jax.inference.requests import Answer, EngineError, Request, Ticket
from kangaroo_jax.system.cpus import usable_cpus

Told = Callable[[Task, Row, bool], None]  # a task, its row, and whether it was answered before


def ask_model(
    model: Kangaroo,
    tasks: Sequence[Task],
    samples: Samples,
    *,
    at_a_time: int = 8,
    strict: bool = False,
    told: Told = lambda task, row, before: None,
) -> None:
    """Ask what `samples` has no answer to yet, in the order of the tasks.

    Args:
        model: who answers.
        tasks: those about one video are neighbours.
        samples: where answers are, and where they go.
        at_a_time: tasks under way together.
        strict: end at the first medium that cannot be read, in place of a row that says why.
        told: called for each task, in order.

    Raises:
        UserError: see `strict`, or the answers cannot be written.
        EngineError: the model cannot go on.
    """
    prompts = Prompts(model)
    under_way: collections.deque[tuple[Prompt, list[Ticket]]] = collections.deque()
    with ThreadPoolExecutor(usable_cpus()) as pool:
        try:
            for task, found in _prepared(pool, prompts, tasks, 2 * at_a_time):
                if isinstance(found, UserError):
                    while under_way:  # rows keep the order of the tasks
                        _collect(under_way, samples, strict, told)
                    fail(task, MEDIA, found, samples, strict, told)
                    continue
                if was_answered(task, found.key, samples, told):
                    continue
                if len(under_way) >= at_a_time:
                    _collect(under_way, samples, strict, told)
                try:
                    under_way.append((found, _submit(model, found)))
                except UserError as error:
                    fail(task, REQUEST, error, samples, strict, told)
            while under_way:
                _collect(under_way, samples, strict, told)
        finally:
            for _, tickets in under_way:
                for ticket in tickets:
                    ticket.cancel()
            pool.shutdown(cancel_futures=True)
            prompts.close()


def _prepared(
    pool: ThreadPoolExecutor, prompts: Prompts, tasks: Iterable[Task], ahead: int
) -> Iterator[tuple[Task, Prompt | UserError]]:
    """Each task with its prompt, made ahead, or why it has none."""
    waiting: collections.deque[tuple[Task, Future[Prompt]]] = collections.deque()
    left = iter(tasks)
    while True:
        while len(waiting) < ahead and (task := next(left, None)) is not None:
            waiting.append((task, pool.submit(prompts.prompt, task)))
        if not waiting:
            return
        task, future = waiting.popleft()
        try:
            yield task, future.result()
        except UserError as error:
            yield task, error


def _submit(model: Kangaroo, prompt: Prompt) -> list[Ticket]:
    recipe, task = prompt.recipe, prompt.task
    options: list[dict[str, Any]] = [{"continuation": ids, "logprobs": 0} for ids in prompt.continuations]
    return [
        model.engine.submit(
            Request(
                recipe.tokens,
                recipe.is_vision,
                recipe.media,
                task.max_new_tokens,
                stop_ids=model.tokenizer.stop_ids,
                **one,
            )
        )
        for one in options or [{}]
    ]


def _collect(
    under_way: "collections.deque[tuple[Prompt, list[Ticket]]]", samples: Samples, strict: bool, told: Told
) -> None:
    """Wait for the first task under way and store its answer."""
    prompt, tickets = under_way.popleft()
    task = prompt.task
    try:
        answers = [ticket.result() for ticket in tickets]
    except UserError as error:
        for ticket in tickets:
            ticket.cancel()
        fail(task, MEDIA, error, samples, strict, told)
        return
    except EngineError as error:
        fail(task, REQUEST, error, samples, strict, told)
        return
    row = _row(prompt, answers)
    samples.add(row)
    told(task, row, False)


def _row(prompt: Prompt, answers: Sequence[Answer]) -> Row:
    usage = answers[0].usage
    row: Row = {**head_of(prompt.task), "key": prompt.key, "identity": prompt.identity}
    if prompt.continuations:
        row["losses"] = [round(-sum(t.logprob for t in a.logprobs) / len(a.logprobs), 6) for a in answers]
        row["text"] = ""
    else:
        row |= {"text": answers[0].text.strip(), "finish": answers[0].finish_reason, "tokens": len(answers[0].ids)}
    row["frame_times"] = [[round(second, 3) for second in times] for times in usage.frame_times]
    row["seconds"] = round(usage.total, 3)
    return row


def was_answered(task: Task, key: str, samples: Samples, told: Told) -> bool:
    """Whether there is an answer with this identity, which is then the task's."""
    kept = samples.answer(key)
    if kept is None:
        return False
    row = {**kept, **head_of(task)}
    if samples.latest.get(task.name, {}).get("key") != key:
        samples.add(row)
    told(task, row, True)
    return True


def head_of(task: Task) -> Row:
    """What names a row."""
    benchmark, variant, name = task.name
    return {"benchmark": benchmark, "variant": variant, "id": name, "style": task.style, "at": round(time.time())}


def fail(task: Task, kind: str, error: Exception, samples: Samples, strict: bool, told: Told) -> None:
    """Store that a task has no answer, and why; raise the error where the run is strict."""
    if strict:
        raise error
    row = {**head_of(task), "key": "", "text": "", "failure": {"kind": kind, "reason": str(error)}}
    if samples.latest.get(task.name, {}).get("failure") != row["failure"]:
        samples.add(row)
    told(task, row, False)
