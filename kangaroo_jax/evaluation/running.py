"""`kangaroo eval`: reads benchmarks, asks, and scores what was answered; asking and scoring are apart."""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.asking import ask_model
from kangaroo_jax.evaluation.asking_server import Server, ask_server
from kangaroo_jax.evaluation.benchmarks.question import Benchmark, Question
from kangaroo_jax.evaluation.benchmarks.table import benchmark_named
from kangaroo_jax.evaluation.checking import questions_of
from kangaroo_jax.evaluation.judging import Judge, judge_answers, judged_in, scores_of
from kangaroo_jax.evaluation.marking import mark
from kangaroo_jax.evaluation.model_page import write_model_page
from kangaroo_jax.evaluation.prompting import CONTROLS, Task, tasks_of
from kangaroo_jax.evaluation.report import write_report
from kangaroo_jax.evaluation.results import (
    lines_of,
    marked_answers,
    result_of,
    write_results,
    write_scored,
    write_submission,
)
from kangaroo_jax.evaluation.samples import Row, Samples
from kangaroo_jax.system.files import make_folder, write_json
from kangaroo_jax.system.json_text import read_json
from kangaroo_jax.system.progress import Progress, Tell

SETTINGS = "eval.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is asked, and how; kept in the workdir, so that `rescore` needs nothing else."""

    benchmarks: tuple[str, ...]
    data: str
    prompt: str = ""  # style of the prompts; "" is each benchmark's first
    frames: int = 0  # of a video; 0 is each benchmark's, or as in training
    limit: int = 0  # questions of each benchmark; 0 is all
    max_new_tokens: int = 0  # 0 is each benchmark's
    controls: bool = False

    def of(self, benchmark: Benchmark) -> dict[str, Any]:
        """What is told in a benchmark's result."""
        return {
            "prompt": self.prompt or next(iter(benchmark.wordings)),
            "frames": self.frames or benchmark.frames or "as in training",
            "max_new_tokens": self.max_new_tokens or benchmark.max_new_tokens,
            "limit": self.limit or None,
        }


@dataclasses.dataclass(frozen=True)
class Share:
    """Which part of the work this process does: the videos of number `index` of `count`, from 1."""

    index: int = 1
    count: int = 1

    @classmethod
    def of(cls, text: str) -> "Share":
        """The share that `2/4` names. Raises UserError."""
        parts = text.split("/")
        if len(parts) == 2 and all(part.isascii() and part.isdigit() for part in parts):
            index, count = map(int, parts)
            if 1 <= index <= count:
                return cls(index, count)
        raise UserError(f"--share={text}: is no part like 2/4")

    @property
    def name(self) -> str:
        """Names its file of answers; "" where one process does all."""
        return f"{self.index}-of-{self.count}" if self.count > 1 else ""

    def has(self, task: Task) -> bool:
        """Whether a task is in it; all questions about a video are in the same."""
        number = int.from_bytes(hashlib.sha256((task.question.video or task.question.id).encode()).digest()[:8])
        return number % self.count == self.index - 1


@dataclasses.dataclass(frozen=True)
class Loading:
    """How the model is held."""

    dtype: str | None = None
    quantize: str | None = None
    slots: int = 4
    cache_gib: float = 4.0
    at_a_time: int = 8
    strict: bool = False  # end at the first medium that cannot be read
    lora: str = ""  # folder of an adapter beside the checkpoint
    ema: bool = False  # the average of the weights that training kept


def evaluate_checkpoint(
    checkpoint: str,
    settings: Settings,
    workdir: Path,
    loading: Loading,
    share: Share,
    judge: Judge | None = None,
    tell: Tell = print,
) -> list[dict[str, Any]]:
    """Ask a checkpoint and score its answers; the results, which are also in the workdir.

    Questions that the workdir has an answer to, by these weights about these bytes, are not asked again.

    Raises:
        UserError: files or flags are not as they should be, or the model cannot go on.
    """
    asked = read_questions(settings)
    with _opened(workdir, settings, share) as samples:
        from kangaroo_jax.inference.chat import Kangaroo
        from kangaroo_jax.inference.requests import EngineError

        options: dict[str, Any] = {
            name: getattr(loading, name) for name in ("dtype", "quantize", "lora", "ema", "slots", "cache_gib")
        }
        with Kangaroo.load(checkpoint, **options) as model:
            try:
                _ask_each(functools.partial(ask_model, model), asked, samples, settings, loading, share, tell)
            except EngineError as error:
                raise UserError(f"the model cannot go on ({error}); run this again to go on") from None
        return score_answers(asked, samples, settings, workdir, judge, tell)


def evaluate_server(
    server: Server,
    settings: Settings,
    workdir: Path,
    loading: Loading,
    share: Share,
    judge: Judge | None = None,
    tell: Tell = print,
) -> list[dict[str, Any]]:
    """The same of a server of OpenAI's protocol; of `loading` only how many are asked at a time, and `strict`."""
    asked = read_questions(settings)
    with _opened(workdir, settings, share) as samples:
        _ask_each(functools.partial(ask_server, server), asked, samples, settings, loading, share, tell)
        return score_answers(asked, samples, settings, workdir, judge, tell)


def _ask_each(
    ask: Callable[..., None],
    asked: Sequence[tuple[Benchmark, Sequence[Question]]],
    samples: Samples,
    settings: Settings,
    loading: Loading,
    share: Share,
    tell: Tell,
) -> None:
    for benchmark, questions in asked:
        tasks = [task for task in tasks_in(benchmark, questions, settings) if share.has(task)]
        progress = Running(benchmark, len(tasks), tell)
        ask(tasks, samples, at_a_time=loading.at_a_time, strict=loading.strict, told=progress.told)
        progress.finish()


def rescore(workdir: Path, judge: Judge | None = None, tell: Tell = print) -> list[dict[str, Any]]:
    """Score the answers in a workdir under every protocol; nothing is asked. Raises UserError."""
    path = workdir / SETTINGS
    if not path.exists():
        raise UserError(f"{workdir}: there is no {SETTINGS}; it is no workdir of an evaluation")
    settings = _settings_in(path)
    with Samples(workdir) as samples:
        return score_answers(read_questions(settings), samples, settings, workdir, judge, tell)


def score_answers(
    asked: Sequence[tuple[Benchmark, Sequence[Question]]],
    samples: Samples,
    settings: Settings,
    workdir: Path,
    judge: Judge | None = None,
    tell: Tell = print,
) -> list[dict[str, Any]]:
    """Have open answers judged, score all that there are, write all files of results, and tell them."""
    results, scored = [], []
    for benchmark, questions in asked:
        judged = _judged(benchmark, questions, samples, workdir, judge, tell)
        results.append(result_of(benchmark, questions, samples, settings.of(benchmark), judged))
        marked = marked_answers(benchmark, questions, samples, judged=judged)
        scored.append((benchmark, marked))
        written = write_submission(workdir, benchmark, marked)
        for line in lines_of(results[-1]):
            tell(line)
        if written is not None:
            tell(f"  submission: {written}")
        if (page := write_model_page(workdir, benchmark, results[-1])) is not None:
            tell(f"  for a model's page: {page}")
    write_scored(workdir, scored)
    write_results(workdir, results)
    tell(f"results: {workdir / 'results.json'}, {write_report(workdir, results, scored)}")
    return results


def _judged(
    benchmark: Benchmark,
    questions: Sequence[Question],
    samples: Samples,
    workdir: Path,
    judge: Judge | None,
    tell: Tell,
) -> dict[str, Row]:
    if not any(question.kind == "open" for question in questions):
        return {}
    with judged_in(workdir) as judged:
        if judge is not None:
            judge_answers(judge, benchmark, questions, samples, judged, tell)
        return scores_of(benchmark, samples, judged)


def read_questions(settings: Settings) -> list[tuple[Benchmark, list[Question]]]:
    """The questions of all benchmarks, before a model is loaded. Raises UserError."""
    found = []
    for name in settings.benchmarks:
        benchmark = benchmark_named(name)
        found.append((benchmark, questions_of(benchmark, Path(settings.data), settings.limit)))
        tasks_in(*found[-1], settings)  # a wrong style is found here
    return found


def tasks_in(benchmark: Benchmark, questions: Sequence[Question], settings: Settings) -> list[Task]:
    """All tasks of a benchmark, with those of the controls. Raises UserError: it has no such style of prompt."""
    variants = ("", *CONTROLS) if settings.controls else ("",)
    return tasks_of(
        benchmark,
        questions,
        settings.prompt,
        variants,
        settings.frames or None,
        settings.max_new_tokens or None,
    )


@contextlib.contextmanager
def _opened(workdir: Path, settings: Settings, share: Share) -> Iterator[Samples]:
    make_folder(workdir)
    with Samples(workdir, share.name) as samples:
        write_json(workdir / SETTINGS, dataclasses.asdict(settings))
        yield samples


def _settings_in(path: Path) -> Settings:
    value = read_json(path)
    names = {field.name for field in dataclasses.fields(Settings)}
    if set(value) != names or not isinstance(value["benchmarks"], list):
        raise UserError(f"{path}: is no list of an evaluation's settings: {json.dumps(value)[:80]}")
    return Settings(**{**value, "benchmarks": tuple(map(str, value["benchmarks"]))})


class Running:
    """The line of progress: how many are answered, how fast, until when, and the score so far."""

    def __init__(self, benchmark: Benchmark, total: int, tell: Tell) -> None:
        self._benchmark = benchmark
        self._credit = self._counted = self._failed = 0.0
        self._progress = Progress(benchmark.name, total, "questions", tell, more=self._more)

    def told(self, task: Task, row: Row, before: bool) -> None:
        """Count an answer; see `asking.Told`."""
        if not task.variant:
            found = mark(self._benchmark, task.question, row, "strict")
            if found is not None and found.counted:
                self._counted += 1
                self._credit += found.credit
            self._failed += bool(row.get("failure"))
        self._progress.add(skipped=before)

    def _more(self) -> str:
        score = f"score {self._credit / self._counted:.1%}" if self._counted else "no score yet"
        return score + (f", {self._failed:.0f} failed" if self._failed else "")

    def finish(self) -> None:
        """The last line, which stays."""
        self._progress.finish()
