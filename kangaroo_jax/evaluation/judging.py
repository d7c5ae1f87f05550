"""Has a language model mark open answers, by URL; its replies are kept in `judged.jsonl` and not asked for twice."""

import asyncio
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from kangaroo_jax.evaluation.benchmarks.question import Benchmark, Question
from kangaroo_jax.evaluation.benchmarks.rubrics import RUBRICS
from kangaroo_jax.evaluation.samples import Row, Samples, key_of
from kangaroo_jax.evaluation.served import endpoint_of
from kangaroo_jax.llm_client.client import Client, Limits
from kangaroo_jax.llm_client.ordered import in_order
from kangaroo_jax.llm_client.requests import Request
from kangaroo_jax.system.progress import Progress, Tell

VARIANT = "judge"


@dataclasses.dataclass(frozen=True)
class Judge:
    """Who marks."""

    url: str
    model: str
    api_key_env: str = ""
    at_a_time: int = 8
    timeout: float = 120.0


def judged_in(folder: Path) -> Samples:
    """The judge's replies in a workdir. Raises UserError."""
    return Samples(folder, kind="judged")


def judge_answers(
    judge: Judge,
    benchmark: Benchmark,
    questions: Sequence[Question],
    samples: Samples,
    judged: Samples,
    tell: Tell = print,
) -> None:
    """Have every open answer marked that this judge has not marked. Raises UserError where no server answers."""
    pending = []
    for question in questions:
        row = samples.latest.get((benchmark.name, "", question.id))
        if question.kind == "open" and row is not None and not row.get("failure"):
            pending.append((question, row))
    if pending:
        asyncio.run(_judge_all(judge, benchmark, pending, judged, tell))


async def _judge_all(
    judge: Judge, benchmark: Benchmark, pending: Sequence[tuple[Question, Row]], judged: Samples, tell: Tell
) -> None:
    endpoint = endpoint_of("judge", judge)
    client = Client(endpoint, Limits(concurrency=judge.at_a_time, answer_retries=0))
    progress = Progress(f"judge {benchmark.name}", len(pending), "answers", tell)

    async def ask(one: tuple[Question, Row]) -> None:
        question, row = one
        rubric = RUBRICS[question.rubric]
        text = rubric.asked(question, row["text"])
        identity = {"judge": judge.model, "at": judge.url, "rubric": rubric.name, "system": rubric.system, "text": text}
        key = key_of(identity)
        head = {"benchmark": benchmark.name, "variant": VARIANT, "id": question.id, "key": key}
        kept = judged.answer(key)
        if kept is None:
            reply = await client.ask(Request(rubric.name, text, rubric.system, max_tokens=512))
            score = None if reply.outcome == "error" else rubric.score(question, reply.text)
            told: Row = {**head, "judge": judge.model, "rubric": rubric.name, "text": reply.text, "score": score}
            told["answer"] = answer_id(row)
            if score is None:
                told["failure"] = {"kind": "judge", "reason": reply.reason or "the reply has no marks"}
            judged.add(told)
        elif judged.latest.get((benchmark.name, VARIANT, question.id), {}).get("key") != key:
            judged.add({**kept, **head})
        progress.add(skipped=kept is not None)

    try:
        await in_order(ask, pending, judge.at_a_time, lambda: None)
    finally:
        await endpoint.close()
    progress.finish()


def answer_id(row: Row) -> str:
    """Names the text that was marked."""
    return hashlib.sha256(row["text"].encode("utf-8", "backslashreplace")).hexdigest()


def scores_of(benchmark: Benchmark, samples: Samples, judged: Samples) -> dict[str, Row]:
    """Question -> the judge's row about its answer as it is now."""
    found = {}
    for (name, variant, question), row in judged.latest.items():
        answer = samples.latest.get((name, "", question))
        if (name, variant) == (benchmark.name, VARIANT) and answer is not None and not answer.get("failure"):
            if row.get("answer") == answer_id(answer):
                found[question] = row
    return found
