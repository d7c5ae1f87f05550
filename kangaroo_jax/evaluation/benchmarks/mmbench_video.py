"""MMBench-Video: open questions about 609 long videos, which a judge marks from 0 to 3 (arXiv:2406.14515)."""

import ast
from collections.abc import Iterator
from pathlib import Path

from kangaroo_jax.data.annotations.conversation import Media
from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.benchmarks import files
from kangaroo_jax.evaluation.benchmarks.question import Benchmark, Question
from kangaroo_jax.evaluation.benchmarks.wording import WORDINGS


def read(folder: Path) -> Iterator[Question]:
    """The questions of `MMBench-Video.tsv`. The pickles that its videos are published in are never loaded."""
    path = files.found(folder, "MMBench-Video.tsv")
    if not (folder / "video").is_dir():
        pickles = list(folder.glob("video_pkl/*.pkl")) or list(folder.glob("*.pkl"))
        held = f"{pickles[0]} is a pickle, which can run code and is never loaded; " if pickles else ""
        raise UserError(f"{folder}: there is no folder video/; {held}put the videos there as video/NAME.mp4")
    for where, row in files.rows(path, ("index", "video", "question", "answer", "dimensions")):
        name = str(row.get("video_path") or f"{row['video']}.mp4").removeprefix("./").removeprefix("video/")
        yield Question(
            str(row["index"]),
            (Media("video", str(folder / "video" / name)),),
            str(row["question"]),
            (),
            str(row["answer"]),
            "open",
            {"dimension": _dimensions(where, str(row["dimensions"]))},
            rubric="similarity",
        )


def _dimensions(where: str, text: str) -> tuple[str, ...]:
    """The names in a Python list that is written as text."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise UserError(f"{where}: its dimensions are no list: {text[:60]!r}") from None
    return tuple(map(str, value)) if isinstance(value, list | tuple) else (str(value),)


MMBENCH_VIDEO = Benchmark(
    name="mmbench-video",
    title="MMBench-Video",
    read=read,
    fetch="huggingface.co/datasets/opencompass/MMBench-Video: MMBench-Video.tsv; the videos as video/NAME.mp4 "
    "(they are published in pickles, which are not read)",
    licence="CC BY 4.0",
    size="609 videos",
    questions=1998,
    wordings=WORDINGS["mmbench-video"],
    readings={},
    published={"score": 1.44},
    note="questions are asked one by one, not packed; the published row was judged by a GPT-4 that is retired: scores "
    "of other judges are not comparable",
    max_new_tokens=256,
)
