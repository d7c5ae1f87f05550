"""Video-MME: 2,700 questions about 900 videos of three lengths, with and without subtitles (arXiv:2405.21075)."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kangaroo_jax.data.annotations.conversation import Media
from kangaroo_jax.evaluation.benchmarks import files
from kangaroo_jax.evaluation.benchmarks.question import Benchmark, Question, Reading
from kangaroo_jax.evaluation.benchmarks.wording import WORDINGS
from kangaroo_jax.evaluation.extraction import harnesses

_COLUMNS = ("videoID", "video_id", "question_id", "duration", "domain", "sub_category", "task_type", "question")


def read(folder: Path, subtitles: bool = False) -> Iterator[Question]:
    """The questions of the Parquet file."""
    path = files.found(folder, "videomme/test-*.parquet", "test-*.parquet", "data/test-*.parquet", "*.parquet")
    for where, row in files.rows(path, (*_COLUMNS, "options", "answer")):
        options = files.plain_options(files.texts(where, row, "options"))
        fault = files.fault_of(str(row["answer"]), options)
        name = str(row["videoID"])
        said = files.video(folder, files.spellings(name, ("subtitle", "subtitles"), (".srt",)))
        yield Question(
            str(row["question_id"]),
            (Media("video", files.video(folder, files.spellings(name, ("data", "videos", "video", "")))),),
            str(row["question"]),
            options,
            "" if fault.startswith("the answer") else str(row["answer"]),
            groups={key: (str(row[key]),) for key in ("duration", "domain", "sub_category", "task_type")},
            subtitles=said if subtitles else "",
            fault=fault and f"{where}: {fault}",
            row={key: str(row[key]) for key in _COLUMNS},
        )


def read_with_subtitles(folder: Path) -> Iterator[Question]:
    """The same, each with the file of its subtitles."""
    return read(folder, subtitles=True)


def submission(answers: Iterable[tuple[Question, str]]) -> tuple[str, Any]:
    """The file that the benchmark's own script reads: a list of videos."""
    videos = []
    for _, asked in itertools.groupby(answers, key=lambda pair: pair[0].row["video_id"]):
        pairs = list(asked)
        row = pairs[0][0].row
        told = [
            {"question_id": q.id, "task_type": q.row["task_type"], "answer": q.answer, "response": letter}
            for q, letter in pairs
        ]
        videos.append(
            {
                "video_id": row["video_id"],
                "duration_category": row["duration"],
                "video_category": row["domain"],
                "video_subcategory": row["sub_category"],
                "missing": False,
                "questions": told,
            }
        )
    return "video_mme.json", videos


VIDEO_MME = Benchmark(
    name="video-mme",
    title="Video-MME",
    read=read,
    fetch="huggingface.co/datasets/lmms-lab/Video-MME: videomme/test-*.parquet, the zips' videos in data/, "
    "the srt files in subtitle/",
    licence="research only, no commercial use; the videos stay their owners'",
    size="900 videos",
    questions=2700,
    wordings=WORDINGS["video-mme"],
    readings={
        "official": {"choice": Reading(harnesses.official_videomme, leaves_out="unread")},
        "lmms-eval": {"choice": Reading(harnesses.lmms_shared, letters="ABCD")},
        "vlmevalkit": {"choice": Reading(harnesses.vlmevalkit_videomme)},
    },
    frames=64,
    published={"score": 56.0, "short": 66.1, "medium": 55.3},
    submission=submission,
)
VIDEO_MME_SUBTITLES = dataclasses.replace(
    VIDEO_MME,
    name="video-mme-subtitles",
    title="Video-MME with subtitles",
    read=read_with_subtitles,
    wordings=WORDINGS["video-mme-subtitles"],
    published={"score": 57.6},
    note="subtitles are the lines on display with a frame that is looked at",
)
