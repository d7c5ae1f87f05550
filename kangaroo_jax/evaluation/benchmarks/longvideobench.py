"""LongVideoBench: questions that refer to a moment of videos of up to an hour, with subtitles (arXiv:2407.15754)."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kangaroo_jax.data.annotations.conversation import Media
from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.benchmarks import files
from kangaroo_jax.evaluation.benchmarks.question import Benchmark, Question, Reading
from kangaroo_jax.evaluation.benchmarks.wording import WORDINGS
from kangaroo_jax.evaluation.extraction import harnesses
from kangaroo_jax.evaluation.extraction.strict import LETTERS

_COLUMNS = ("id", "video_path", "question", "candidates", "duration_group", "question_category", "subtitle_path")


def read_val(folder: Path) -> Iterator[Question]:
    """The questions of `lvb_val.json`."""
    for where, row in files.rows(files.found(folder, "lvb_val.json"), (*_COLUMNS, "correct_choice")):
        place, count = row["correct_choice"], len(files.texts(where, row, "candidates"))
        if not isinstance(place, int) or not 0 <= place < count:
            raise UserError(f"{where}: correct_choice is {place!r}, but there are {count} candidates")
        yield _question(folder, where, row, LETTERS[place])


def read_test(folder: Path) -> Iterator[Question]:
    """The questions of `lvb_test_wo_gt.json`, whose answers are not public."""
    for where, row in files.rows(files.found(folder, "lvb_test_wo_gt.json"), _COLUMNS):
        yield _question(folder, where, row, None)


def _question(folder: Path, where: str, row: files.Row, letter: str | None) -> Question:
    video = files.video(folder, [f"{base}{row['video_path']}" for base in ("videos/", "")])
    return Question(
        str(row["id"]),
        (Media("video", video),),
        str(row["question"]),
        files.texts(where, row, "candidates"),
        letter,
        groups={"duration": (str(row["duration_group"]),), "category": (str(row["question_category"]),)},
        subtitles=files.video(folder, [f"{base}{row['subtitle_path']}" for base in ("subtitles/", "")]),
        subtitles_from=files.number(where, row, "starting_timestamp_for_subtitles"),
    )


def submission(answers: Iterable[tuple[Question, str]]) -> tuple[str, Any]:
    """The file of the benchmark's server: the letter of each question."""
    return "longvideobench_test.json", {question.id: letter for question, letter in answers}


_GUESSES = Reading(harnesses.lmms_longvideobench)
LONGVIDEOBENCH = Benchmark(
    name="longvideobench",
    title="LongVideoBench (val)",
    read=read_val,
    fetch="huggingface.co/datasets/longvideobench/LongVideoBench: lvb_val.json, lvb_test_wo_gt.json, "
    "videos/ and subtitles/ from the tar parts",
    licence="CC BY-NC-SA 4.0",
    size="videos of up to an hour",
    questions=1337,
    wordings=WORDINGS["longvideobench"],
    readings={
        "official": {"choice": _GUESSES},
        "lmms-eval": {"choice": _GUESSES},
        "vlmevalkit": {"choice": Reading(harnesses.vlmevalkit_longvideobench)},
    },
    note="subtitles stand between the frames, after the group of frames that is on display at their middle; where "
    "the harness guesses, the chance of its guess is credited; the published row is of the test set",
)
LONGVIDEOBENCH_TEST = dataclasses.replace(
    LONGVIDEOBENCH,
    name="longvideobench-test",
    title="LongVideoBench (test)",
    read=read_test,
    questions=5341,
    readings={},
    published={"score": 54.8},
    note="answers are not public: a submission file is written; subtitles stand between the frames",
    submission=submission,
)
