"""`report.html`: the scores beside the published row, controls, groups, and answers with the frames that were seen."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from kangaroo_jax.data.annotations.conversation import Media
from kangaroo_jax.data.media.video import folder_of_frames, load_frames, load_media
from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.benchmarks.question import Benchmark
from kangaroo_jax.evaluation.marking import Marked
from kangaroo_jax.report.page import picture, render
from kangaroo_jax.system.files import write_text

_SIDE, _FRAMES = 96, 8  # pixels and number of the frames of a question
_EACH = 3  # right answers, and wrong ones, that are shown of a benchmark
_GROUPS = 24  # groups of an axis that are listed
_LEAD = (
    "The same answers under every protocol. Intervals are clustered by video; what could not be read, was missing or "
    "failed is wrong and counted."
)


def write_report(
    folder: Path, results: Sequence[Mapping[str, Any]], scored: Sequence[tuple[Benchmark, Sequence[Marked]]]
) -> Path:
    """Write `report.html`; returns its path."""
    tiles = []
    for result in results:
        one = result["protocols"]["strict"]
        if one["counted"]:
            interval = f"strict, {one['low']:.1%} to {one['high']:.1%}"
            tiles.append((result["title"], f"{one['score']:.1%}", interval))
        elif judged := result.get("judged"):
            tiles.append((result["title"], f"{judged['score']:.2f}", f"of {judged['most']:g}, judged"))
    parts = [_part(result, marked) for result, (_, marked) in zip(results, scored, strict=True)]
    page = render("evaluation.html", title="Evaluation", lead=_LEAD, tiles=tiles, parts=parts)
    return write_text(folder / "report.html", page)


def _part(result: Mapping[str, Any], marked: Sequence[Marked]) -> dict[str, Any]:
    published = ", ".join(f"{name} {value:g}" for name, value in result["published"].items())
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in result["settings"].items() if value)
    lead = [f"{result['questions']:,} questions about {result['videos']:,} videos, chance {result['chance']:.1%}"]
    lead += [f"the protocols differ by {result['spread']:.1%}", settings]
    lead += [f"Kangaroo's published row: {published}"] * bool(published) + [result["note"]] * bool(result["note"])
    rows = []
    for name, one in result["protocols"].items():
        counts = [f"{one[key]:,}" for key in ("counted", "unread", "media", "request", "unasked", "unjudged")]
        shown = ("–", "–", "–")
        if one["counted"]:
            interval = f"{one['low']:.1%} to {one['high']:.1%}"
            shown = (f"{one['score']:.1%}", interval, f"{one['smallest_difference']:.1%}")
        rows.append((name, *shown, *counts))
    if judged := result.get("judged"):
        by = f" by {', '.join(judged['judges'])} ({', '.join(judged['rubrics'])})" if judged["judged"] else ""
        lead.append(f"{judged['judged']:,} open answers judged{by}: {judged['score']:.2f} of {judged['most']:g}")
    controls = [
        (
            name,
            f"{one['score']:.1%}",
            f"{one['adds']:+.1%}",
            f"{one['adds_low']:+.1%} to {one['adds_high']:+.1%}",
            one["questions"],
        )
        for name, one in result.get("controls", {}).items()
    ]
    groups = [
        (axis, [(name, f"{one['score']:.1%}", f"{one['questions']:,}") for name, one in list(found.items())[:_GROUPS]])
        for axis, found in result["groups"].items()
    ]
    return {
        "title": result["title"],
        "lead": "; ".join(lead) + ".",
        "protocols": rows,
        "controls": controls,
        "needles": heat_maps(result.get("needles", ())),
        "groups": groups,
        "samples": [_sample(one) for one in chosen(marked)],
    }


def heat_maps(
    cells: Sequence[Mapping[str, Any]],
) -> list[tuple[str, list[str], list[tuple[str, list[tuple[float, float]]]]]]:
    """(mode, lengths, rows) of needles; a row is a depth and the shares (found, shown) at each length."""
    maps = []
    for mode in dict.fromkeys(cell["mode"] for cell in cells):
        some = [cell for cell in cells if cell["mode"] == mode]
        at = {(cell["length"], cell["depth"]): (cell["found"], cell["shown"]) for cell in some}
        lengths, depths = (list(dict.fromkeys(cell[key] for cell in some)) for key in ("length", "depth"))
        maps.append((mode, lengths, [(depth, [at[length, depth] for length in lengths]) for depth in depths]))
    return maps


def chosen(marked: Sequence[Marked], each: int = _EACH) -> list[Marked]:
    """The first right and the first wrong answers, each about another video."""
    found: dict[bool, dict[str, Marked]] = {True: {}, False: {}}
    for one in marked:
        mark = one.marks.get("strict")
        if mark is not None and mark.counted and one.row is not None and not one.row.get("failure"):
            of = found[mark.credit == 1]
            if len(of) < each:
                of.setdefault(one.question.video, one)
    return [*found[True].values(), *found[False].values()]


def _sample(one: Marked) -> dict[str, Any]:
    question, mark, row = one.question, one.marks["strict"], one.row or {}
    options = []
    for letter, option in zip(question.letters, question.options, strict=False):
        state = "good" if letter == question.answer else "bad" if letter == mark.read else ""
        options.append((state, letter, option))
    tags = [name for names in question.groups.values() for name in names][:4]
    return {
        "pictures": pictures(question.media, row),
        "correct": mark.credit == 1,
        "tags": tags,
        "question": question.text,
        "options": options,
        "answer": row.get("text") or mark.read,
        "truth": question.answer or "",
    }


def pictures(media: Sequence[Media], row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A few of the frames that were seen, and their seconds; none where they cannot be read any more."""
    shown = []
    for medium, seconds in zip(media, row.get("frame_times") or (), strict=False):
        step = max(1, -(-len(seconds) // _FRAMES))
        times = sorted(set(seconds[::step]))
        try:
            if medium.frames or os.path.isdir(medium.path):
                files = medium.frames or folder_of_frames(medium.path)
                places = [min(i * len(files) // len(times), len(files) - 1) for i in range(len(times))]
                clip = load_frames([files[place] for place in places], times, _SIDE)
            else:
                clip = load_media(medium.path, medium.kind, image_size=_SIDE, times=times, start=medium.start)
        except UserError:
            continue
        for pixels, second in zip(clip.pixels, clip.times, strict=True):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, format="JPEG", quality=80)
            shown.append((picture(file.getvalue()), f"{second:.1f}".removesuffix(".0") + " s"))
    return shown
