"""SEED-Bench: dimensions 19 to 22 of version 2 (Kangaroo's row), and the video part of version 1 (arXiv:2307.16125)."""

from collections.abc import Iterator
from pathlib import Path

from kangaroo_jax.data.annotations.conversation import Media
from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.benchmarks import files
from kangaroo_jax.evaluation.benchmarks.question import Benchmark, Question, Reading
from kangaroo_jax.evaluation.benchmarks.wording import WORDINGS
from kangaroo_jax.evaluation.extraction import harnesses

DIMENSIONS_2 = {19: "GVU", 20: "AR", 21: "AP", 22: "PU"}
DIMENSIONS_1 = {10: "action recognition", 11: "action prediction", 12: "procedure understanding"}
STILLS_A_SECOND = 1.0  # of version 2's eight stills, which have no times
FRAMES_A_SECOND = 15.0  # in which version 1 states the segments of Breakfast
_COLUMNS = ("question", "question_id", "question_type_id", "data_id", "choice_a", "choice_b", "choice_c", "choice_d")


def read_2(folder: Path) -> Iterator[Question]:
    """Dimensions 19 to 22 of `SEED-Bench_v2_level1_2_3.json`: eight stills each."""
    path = files.found(folder, "SEED-Bench_v2_level1_2_3.json", "SEED-Bench_v2*.json")
    for where, row in files.rows(path, _COLUMNS, inside="questions"):
        if row["question_type_id"] not in tuple(DIMENSIONS_2):
            continue
        if not isinstance(row["data_id"], list) or not row["data_id"]:
            raise UserError(f"{where}: its data_id is no list of stills")
        places = [
            [f"{base}/{name}" for base in ("seed_bench_image_v2", "SEED-Bench-2-image", ".")] for name in row["data_id"]
        ]
        stills = tuple(files.video(folder, names) for names in places)
        media = Media("video", stills[0], frames=stills, sample_fps=STILLS_A_SECOND)
        yield _question(where, row, media, DIMENSIONS_2)


def read_1(folder: Path) -> Iterator[Question]:
    """The video questions of `SEED-Bench.json`: Something-Something V2, Epic-Kitchens and Breakfast."""
    path = files.found(folder, "SEED-Bench.json")
    for where, row in files.rows(path, _COLUMNS, inside="questions"):
        if row["question_type_id"] not in tuple(DIMENSIONS_1):
            continue
        video = files.video(folder, [f"{base}/{row['data_id']}" for base in ("video", "v1_video", "videos", ".")])
        start, end = _segment(where, row)
        yield _question(where, row, Media("video", video, start=start, end=end), DIMENSIONS_1)


def _segment(where: str, row: files.Row) -> tuple[float | None, float | None]:
    """The seconds at which a question's part of the video begins and ends. Raises UserError."""
    found = row.get("segment") or [None, None]
    if not (isinstance(found, list) and len(found) == 2 and all(isinstance(x, int | float | None) for x in found)):
        raise UserError(f"{where}: its segment is no start and end: {repr(found)[:60]}")
    if None not in found and row["question_type_id"] == 12:
        return found[0] / FRAMES_A_SECOND, found[1] / FRAMES_A_SECOND
    return found[0], found[1]


def _question(where: str, row: files.Row, media: Media, dimensions: dict[int, str]) -> Question:
    if "answer" not in row:
        raise UserError(f"{where}: has no answer; fetch the file with answers")
    options = tuple(str(row[f"choice_{letter}"]) for letter in "abcd")
    fault = files.fault_of(str(row["answer"]), options)
    return Question(
        str(row["question_id"]),
        (media,),
        str(row["question"]),
        options,
        "" if fault.startswith("the answer") else str(row["answer"]),
        groups={"dimension": (dimensions[row["question_type_id"]],)},
        fault=fault and f"{where}: {fault}",
    )


_LMMS = {"lmms-eval": {"choice": Reading(harnesses.first_character)}}
SEED_BENCH_2 = Benchmark(
    name="seed-bench-2",
    title="SEED-Bench-2, dimensions 19 to 22",
    read=read_2,
    fetch="huggingface.co/datasets/AILab-CVC/SEED-Bench-2: SEED-Bench_v2_level1_2_3.json, and SEED-Bench-2-image.zip.* "
    "joined and unpacked to seed_bench_image_v2/",
    licence="CC BY-NC 4.0",
    size="8 stills a question",
    questions=5341,
    wordings=WORDINGS["seed-bench-2"],
    readings=_LMMS,
    published={"score": 59.2, "GVU": 61.4, "AR": 69.7, "AP": 54.6, "PU": 45.9},
    note="officially the likeliest option's text; the eight stills have no times, one a second is inferred",
)
SEED_BENCH_1 = Benchmark(
    name="seed-bench-1",
    title="SEED-Bench, video",
    read=read_1,
    fetch="huggingface.co/datasets/AILab-CVC/SEED-Bench: SEED-Bench.json, and the three sources' videos in video/",
    licence="CC BY-NC 4.0; each source's own for the videos",
    size="three sources",
    questions=3757,
    wordings=WORDINGS["seed-bench-1"],
    readings=_LMMS,
    note="officially the likeliest option's text",
)
