"""EgoSchema: one question with five options about three minutes of each of 5,031 videos (arXiv:2308.09126)."""

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


def read_subset(folder: Path) -> Iterator[Question]:
    """The 500 questions whose answers are public."""
    return (question for question in read(folder) if question.answer is not None)


def read(folder: Path) -> Iterator[Question]:
    """The questions of `questions.json`; answers from `subset_answers.json`."""
    path = files.found(folder, "questions.json")
    answers = files.json_value(files.found(folder, "subset_answers.json"))
    if not isinstance(answers, dict):
        raise UserError(f"{folder}/subset_answers.json: expected an object of answers, found {type(answers).__name__}")
    for where, row in files.rows(path, ("q_uid", "question", *(f"option {i}" for i in range(5)))):
        name = str(row["q_uid"])
        options = tuple(str(row[f"option {i}"]) for i in range(5))
        place = answers.get(name)
        if place is not None and place not in range(5):
            raise UserError(f"{folder}/subset_answers.json: the answer of {name} is {place!r}, not 0 to 4")
        letter = None if place is None else LETTERS[int(place)]
        fault = files.fault_of(letter, options) if letter else ""
        media = (Media("video", files.video(folder, files.spellings(name, ("videos", "good_clips_git", "")))),)
        yield Question(name, media, str(row["question"]), options, letter, fault=fault and f"{where}: {fault}")


def submission(answers: Iterable[tuple[Question, str]]) -> tuple[str, Any]:
    """The file of Kaggle's and the validation server: the number of each answer, -1 where there is none."""
    return "egoschema.json", {question.id: LETTERS.find(letter) if letter else -1 for question, letter in answers}


_FETCH = "github.com/egoschema/EgoSchema: questions.json, subset_answers.json, and the videos in videos/Q_UID.mp4"
EGOSCHEMA = Benchmark(
    name="egoschema",
    title="EgoSchema (all)",
    read=read,
    fetch=_FETCH,
    licence="Ego4D's",
    size="5,031 videos of three minutes",
    questions=5031,
    wordings=WORDINGS["egoschema"],
    readings={"lmms-eval": {"choice": Reading(harnesses.lmms_egoschema)}},
    published={"score": 62.7},
    note="500 answers are public; whether the published row is of all 5,031 is not known, nor are its frames",
    submission=submission,
)
EGOSCHEMA_SUBSET = Benchmark(
    name="egoschema-subset",
    title="EgoSchema (subset)",
    read=read_subset,
    fetch=_FETCH,
    licence="Ego4D's",
    size="500 videos of three minutes",
    questions=500,
    wordings=WORDINGS["egoschema"],
    readings=EGOSCHEMA.readings,
    note="the 500 questions whose answers are public; the published row is of another set",
)
