"""What the quickstart puts into its report: curves, tables, pictures of questions, the chats."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kangaroo_jax.corpus.make import Corpus
from kangaroo_jax.data.media.image import load_image
from kangaroo_jax.data.media.video import FramePolicy, load_video
from kangaroo_jax.evaluation.answering import Answers
from kangaroo_jax.quickstart.recipe import Recipe
from kangaroo_jax.quickstart.report_page import write_report
from kangaroo_jax.training.metrics import read_metrics

PICTURE_SIDE = 96  # pixels of a frame in the report
FRAMES_SHOWN = 8


def write_quickstart_report(
    workdir: Path,
    recipe: Recipe,
    corpus: Corpus,
    results: Mapping[str, Any],
    chats: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
    sections: Sequence[str] = (),
) -> Path:
    """Write `workdir/report.html` from what the stages left in `workdir`; returns its path. `sections` are HTML."""
    last = results["stages"][-1]["name"]
    data = {
        "title": recipe.title,
        "lead": recipe.lead,
        "seconds": results["seconds"],
        "peak_rss_gib": results["peak_rss_gib"],
        "chance": results["chance"],
        "stages": [stage_data(workdir / name, results) for name in recipe.stages],
        "samples": [sample_data(record, corpus) for record in chosen_samples(read_answers(workdir / last))],
        "chats": [chat_data(chat) for chat in chats],
        "ablations": results.get("ablations", []),
        "sections": list(sections),
        "environment": {**environment, "commands": [f"./launch/{recipe.script}"]},
    }
    return write_report(workdir / "report.html", data)


def read_answers(stage: Path) -> Answers:
    """The marked answers of a stage."""
    return Answers.from_json(json.loads((stage / "eval.json").read_text(encoding="utf-8")))


def stage_data(stage: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """Curve, time and accuracies of a stage."""
    record = json.loads((stage / "done.json").read_text(encoding="utf-8"))
    data = {**record, "losses": [[line["step"], line["loss"]] for line in read_metrics(stage / "metrics.jsonl")]}
    if (stage / "eval.json").exists():
        answers = read_answers(stage)
        data |= {"metrics": answers.metrics(), "by_kind": answers.by_kind()}
    return data


def chosen_samples(answers: Answers, each: int = 1) -> list[dict[str, Any]]:
    """For each split and kind of multiple-choice question one right answer and, where there is one, a wrong one."""
    chosen = []
    kinds = dict.fromkeys((r["split"], r["question_kind"]) for r in answers.records)
    for i, (split, kind) in enumerate(kinds):
        language = ("en", "zh")[i % 2]
        rows = [r for r in answers.records if (r["split"], r["question_kind"], r["format"]) == (split, kind, "mcq")]
        rows.sort(key=lambda r: r["language"] != language)
        chosen += [r for r in rows if r["correct"]][:each] + [r for r in rows if not r["correct"]][:each]
    return chosen


def sample_data(record: Mapping[str, Any], corpus: Corpus) -> dict[str, Any]:
    """A question with its frames, for the report."""
    frames, times = pictures(corpus.folder / (record.get("video") or record["image"]))
    question = record["conversations"][0]["value"].split("\n")[1]
    return {
        "frames": frames,
        "times": times,
        "question": question,
        "options": record["options"],
        "answer": record["prediction"],
        "truth": record["answer"],
        "language": record["language"],
        "kind": f"{record['split']}/{record['question_kind']}",
        "correct": record["correct"],
    }


def chat_data(chat: Mapping[str, Any]) -> dict[str, Any]:
    """A chat with frames of its video, for the report."""
    frames, times = pictures(Path(chat["video"]))
    return {"title": chat["title"], "frames": frames, "times": times, "turns": [tuple(turn) for turn in chat["turns"]]}


def pictures(path: Path) -> tuple[list[bytes], list[float]]:
    """A few frames of a medium as JPEG, and their seconds."""
    if path.suffix == ".mp4":
        policy = FramePolicy().narrowed(nframes=FRAMES_SHOWN)
        clip = load_video(path, image_size=PICTURE_SIDE, policy=policy)
        return [jpeg(frame) for frame in clip.pixels], [float(t) for t in clip.times]
    return [jpeg(load_image(path, PICTURE_SIDE))], [0.0]


def jpeg(pixels: np.ndarray) -> bytes:
    """uint8[S, S, 3] as the bytes of a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()
