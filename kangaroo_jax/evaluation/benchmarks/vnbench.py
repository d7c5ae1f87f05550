"""VNBench: needles in videos, each asked in four orders of its options and right only if all are (arXiv:2406.09367)."""

from collections.abc import Iterator
from pathlib import Path

from kangaroo_jax.data.annotations.conversation import Media
from kangaroo_jax.evaluation.benchmarks import files
from kangaroo_jax.evaluation.benchmarks.question import Benchmark, Question, Reading
from kangaroo_jax.evaluation.benchmarks.wording import WORDINGS
from kangaroo_jax.evaluation.extraction import harnesses
from kangaroo_jax.evaluation.extraction.strict import LETTERS


def read(folder: Path) -> Iterator[Question]:
    """The questions of `VNBench-main-4try.json`."""
    path = files.found(folder, "VNBench-main-4try.json", "VNBench*.json*", "anno.jsonl")
    for where, row in files.rows(path, ("video", "question", "options", "question_id", "gt", "type")):
        options = files.plain_options(files.texts(where, row, "options"))
        letter = LETTERS[row["gt"]] if isinstance(row["gt"], int) and row["gt"] in range(10) else str(row["gt"])
        fault = files.fault_of(letter, options)
        name = str(row["question_id"])
        video = str(row["video"])
        yield Question(
            name,
            (Media("video", files.video(folder, [video, f"videos/{video}", f"videos/{video.rsplit('/', 1)[-1]}"])),),
            str(row["question"]),
            options,
            "" if fault.startswith("the answer") else letter,
            groups={"type": (str(row["type"]),), "task": (_task(str(row["type"])),)},
            unit=name.rpartition("_")[0],
            fault=fault and f"{where}: {fault}",
        )


def _task(kind: str) -> str:
    return next((name for name in ("ret", "ord", "cnt") if kind.startswith(name)), kind)


VNBENCH = Benchmark(
    name="vnbench",
    title="VNBench",
    read=read,
    fetch="huggingface.co/datasets/Joez1717/VNBench: VNBench-main-4try.json and the videos where its rows say",
    licence="CC BY-NC-SA 4.0",
    size="1,350 videos",
    questions=5400,
    wordings=WORDINGS["vnbench"],
    readings={"official": {"choice": Reading(harnesses.official_vnbench)}},
    average="type",
    note="right only if all four orders are; the score is the mean of nine types",
)
