"""LVBench: 15 questions about each of 103 videos of an hour (arXiv:2406.08035)."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kangaroo_jax.data.annotations.conversation import Media
from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.benchmarks import files
from kangaroo_jax.evaluation.benchmarks.question import Benchmark, Question, Reading
from kangaroo_jax.evaluation.benchmarks.wording import WORDINGS
from kangaroo_jax.evaluation.extraction import harnesses

_OPTION = re.compile(r"^\(([A-H])\)\s*(.*)$", re.MULTILINE)


def read(folder: Path) -> Iterator[Question]:
    """The questions of `video_info.meta.jsonl`, a line a video; options are part of the question's text."""
    path = files.found(folder, "video_info.meta.jsonl", "data/video_info.meta.jsonl")
    for where, row in files.rows(path, ("key", "qa")):
        name = str(row["key"])
        media = (Media("video", files.video(folder, _places(name))),)
        if not isinstance(row["qa"], list):
            raise UserError(f"{where}: its 'qa' is no list of questions")
        for asked in row["qa"]:
            try:
                uid, text, letter = str(asked["uid"]), str(asked["question"]), str(asked["answer"])
                kinds = tuple(map(str, asked["question_type"]))
            except (KeyError, TypeError) as error:
                raise UserError(f"{where}: a question under 'qa' has no {error}") from None
            options = tuple(option.strip() for _, option in _OPTION.findall(text))
            text = _OPTION.split(text, maxsplit=1)[0].rstrip("\n")
            fault = files.fault_of(letter, options)
            answer = "" if fault.startswith("the answer") else letter
            groups = {"task": kinds, "type": (str(row.get("type", "")),)}
            yield Question(uid, media, text, options, answer, groups=groups, fault=fault and f"{where}: {fault}")


def _places(name: str) -> list[str]:
    return files.spellings(name, ("videos", "video", "all_videos", "data/videos", ""))


def submission(answers: Iterable[tuple[Question, str]]) -> tuple[str, Any]:
    """The file of the official script: the letter of each question."""
    return "lvbench.json", {question.id: letter for question, letter in answers}


LVBENCH = Benchmark(
    name="lvbench",
    title="LVBench",
    read=read,
    fetch="huggingface.co/datasets/THUDM/LVBench: video_info.meta.jsonl; the videos, which are on "
    "YouTube, in videos/KEY.mp4",
    licence="CC BY-NC-SA 4.0; the videos stay their owners'",
    size="103 videos of an hour",
    questions=1549,
    wordings=WORDINGS["lvbench"],
    readings={
        "official": {"choice": Reading(harnesses.official_lvbench)},
        "lmms-eval": {"choice": Reading(harnesses.lmms_shared, letters="ABCD")},
    },
    published={"score": 39.4},
    note="the official script divides by the answers that are there; a question counts in each of its tasks; "
    "frames of the published row are not public",
    submission=submission,
)
