"""TempCompass: five temporal aspects of 410 videos, asked in four formats (arXiv:2403.00476)."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from kangaroo_jax.data.annotations.conversation import Media
from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.benchmarks import files
from kangaroo_jax.evaluation.benchmarks.question import Benchmark, Question, Reading
from kangaroo_jax.evaluation.benchmarks.wording import WORDINGS
from kangaroo_jax.evaluation.extraction import harnesses

FORMATS = {"multi-choice": "choice", "yes_no": "yes_no", "caption_matching": "matching", "captioning": "open"}


def read(folder: Path) -> Iterator[Question]:
    """The questions of `questions/FORMAT.json`: videos, in them aspects, in them questions."""
    for form, kind in FORMATS.items():
        path = files.found(folder, f"questions/{form}.json", f"{form}.json")
        value = files.json_value(path)
        if not isinstance(value, dict):
            raise UserError(f"{path}: expected an object of videos, found {type(value).__name__}")
        for name, aspects in value.items():
            media = (Media("video", files.video(folder, files.spellings(name, ("videos", "video", "")))),)
            if not isinstance(aspects, dict) or not all(isinstance(asked, list) for asked in aspects.values()):
                raise UserError(f"{path}, {name}: expected lists of questions by their aspect")
            for aspect, asked in aspects.items():
                for number, row in enumerate(asked):
                    where = f"{path}, {name}, {aspect}, question {number + 1}"
                    if not isinstance(row, dict) or "question" not in row or "answer" not in row and kind != "open":
                        raise UserError(f"{where}: has no question or no answer")
                    groups = {"format": (form,), "aspect": (aspect,)}
                    yield _question(f"{form}/{name}/{aspect}/{number}", where, row, kind, media, groups)


def _question(
    name: str, where: str, row: files.Row, kind: str, media: tuple[Media, ...], groups: Mapping[str, tuple[str, ...]]
) -> Question:
    if kind == "open":
        judged = {"question": str(row.get("mc_question", "")), "answer": str(row.get("mc_answer", ""))}
        return Question(
            name, media, str(row["question"]), (), judged["answer"], kind, groups, rubric="caption", row=judged
        )
    text, *lines = str(row["question"]).split("\n")
    options: tuple[str, ...]
    answer = str(row["answer"])
    if kind == "yes_no":
        text, options, answer = str(row["question"]), ("yes", "no"), answer.strip().lower()
    else:
        options = tuple(lines) if kind == "matching" else files.plain_options(lines)
    letter, fault = files.letter_of(answer, options if kind == "yes_no" else lines)
    return Question(name, media, text, options, letter, kind, groups, fault=fault and f"{where}: {fault}")


_OFFICIAL = {
    "open": Reading(harnesses.first_character),  # a judge's, whatever the protocol
    "choice": Reading(harnesses.official_tempcompass),
    "yes_no": Reading(harnesses.official_yes_no),
    "matching": Reading(harnesses.official_matching),
}
TEMPCOMPASS = Benchmark(
    name="tempcompass",
    title="TempCompass",
    read=read,
    fetch="github.com/llyx97/TempCompass: questions/*.json; huggingface.co/datasets/lmms-lab/TempCompass: the videos "
    "in videos/ID.mp4",
    licence="see its page",
    size="410 videos",
    questions=7540,
    wordings=WORDINGS["tempcompass"],
    readings={"official": _OFFICIAL, "lmms-eval": _OFFICIAL, "vlmevalkit": _OFFICIAL},
    published={"score": 62.5},
    counts_judged=True,
    note="averaged over questions of all formats; captioning needs a judge; readings are those without a judge",
)
