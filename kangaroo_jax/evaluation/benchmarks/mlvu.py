"""MLVU: seven multiple-choice and two generation tasks about long videos (arXiv:2406.04264), dev and test."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kangaroo_jax.data.annotations.conversation import Media
from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.benchmarks import files
from kangaroo_jax.evaluation.benchmarks.question import Benchmark, Question, Reading
from kangaroo_jax.evaluation.benchmarks.rubrics import RUBRICS
from kangaroo_jax.evaluation.benchmarks.wording import WORDINGS
from kangaroo_jax.evaluation.extraction import harnesses

TASKS = ("plotQA", "needle", "ego", "count", "order", "anomaly_reco", "topic_reasoning", "sub_scene", "summary")
_WHERE = ("MLVU/", "")


def read_dev(folder: Path) -> Iterator[Question]:
    """The questions of `json/1_plotQA.json` to `9_summary.json`; those without candidates are for a judge."""
    for number, task in enumerate(TASKS, start=1):
        name = f"{number}_{task}"
        path = files.found(folder, *(f"{base}json/{name}.json" for base in _WHERE))
        for index, (where, row) in enumerate(files.rows(path, ("video", "question", "answer"))):
            video = files.video(folder, [f"{base}video/{name}/{row['video']}" for base in _WHERE])
            options = files.texts(where, row, "candidates") if row.get("candidates") else ()
            if not options and task not in RUBRICS:
                raise UserError(f"{where}: has no candidates")
            letter, fault = files.letter_of(str(row["answer"]), options) if options else (str(row["answer"]), "")
            yield Question(
                f"{name}-{index}",
                (Media("video", video),),
                str(row["question"]),
                options,
                letter,
                kind="choice" if options else "open",
                groups={"task": (task,)},
                fault=fault and f"{where}: {fault}",
                rubric="" if options else task,
                row={"points": row.get("scoring_points", "")},
            )


def read_test(folder: Path) -> Iterator[Question]:
    """The questions of `test_question.json`, whose answers are not public (a column `answer` is read where it is)."""
    path = files.found(folder, "test_question.json", "MLVU_Test/test_question.json", "*/test_question.json")
    for where, row in files.rows(path, ("question_id", "question_type", "video", "question", "candidates")):
        options = files.texts(where, row, "candidates")
        letter = files.letter_of(str(row["answer"]), options)[0] if "answer" in row else None
        video = files.video(path.parent, [f"{base}{row['video']}" for base in ("video/", "test_video/", "videos/", "")])
        yield Question(
            str(row["question_id"]),
            (Media("video", video),),
            str(row["question"]),
            options,
            letter,
            groups={"task": (str(row["question_type"]),)},
        )


def submission(answers: Iterable[tuple[Question, str]]) -> tuple[str, Any]:
    """The file of the authors' evaluation of the test set."""
    rows = [{"question_id": q.id, "question_type": q.groups["task"][0], "option": letter} for q, letter in answers]
    return "mlvu_test.json", rows


_LMMS = {"choice": Reading(harnesses.lmms_shared, letters="ABCD")}
MLVU = Benchmark(
    name="mlvu",
    title="MLVU (dev)",
    read=read_dev,
    fetch="huggingface.co/datasets/MLVU/MVLU: MLVU/json/ and MLVU/video/",
    licence="CC BY-NC-SA 4.0",
    size="videos of 3 minutes to 2 hours",
    questions=2593,
    wordings=WORDINGS["mlvu"],
    readings={
        "official": {"choice": Reading(harnesses.official_mlvu)},
        "lmms-eval": _LMMS,
        "vlmevalkit": {"choice": Reading(harnesses.vlmevalkit_mlvu, several=True)},
    },
    average="task",
    published={"score": 61.0},
    note="the score is M-Avg, the mean of seven tasks; frames of the published row are not public",
)
MLVU_TEST = Benchmark(
    name="mlvu-test",
    title="MLVU (test)",
    read=read_test,
    fetch="huggingface.co/datasets/MLVU/MLVU_Test: test_question.json and the videos beside it in video/",
    licence="CC BY-NC-SA 4.0",
    size="videos of 3 minutes to 2 hours",
    questions=0,
    wordings=WORDINGS["mlvu-test"],
    readings={"official": {"choice": Reading(harnesses.official_mlvu)}, "lmms-eval": _LMMS},
    average="task",
    note="answers are not public; lmms-eval knows four of the six letters",
    submission=submission,
)
