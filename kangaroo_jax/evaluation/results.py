"""What a run found: `results.json`, `scored.jsonl` (a line a question), submission files, lines for the terminal."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.benchmarks.question import PROTOCOLS, Benchmark, Question
from kangaroo_jax.evaluation.benchmarks.rubrics import RUBRICS
from kangaroo_jax.evaluation.marking import FAILURES, Marked, Score, by_group, chance, mark_all, score
from kangaroo_jax.evaluation.prompting import CONTROLS, rotated
from kangaroo_jax.evaluation.samples import Row, Samples
from kangaroo_jax.evaluation.statistics import compare, estimate
from kangaroo_jax.system.files import write_bytes, write_json
from kangaroo_jax.system.json_text import json_line, read_lines

RESULTS, SCORED = "results.json", "scored.jsonl"


def result_of(
    benchmark: Benchmark,
    questions: Sequence[Question],
    samples: Samples,
    settings: Mapping[str, Any],
    judged: Mapping[str, Row] | None = None,
) -> dict:
    """The result of a benchmark as plain data; the same answers give the same data, whenever they were given.

    Raises UserError: the answers are of several models or prompts.
    """
    judged = judged or {}
    marked = marked_answers(benchmark, questions, samples, judged=judged)
    rows = [one.row for one in marked if one.row is not None]
    _check_alike(benchmark, rows)
    protocols = {name: _plain(found) for name in PROTOCOLS if (found := score(benchmark, marked, name)) is not None}
    shown = [one["score"] for one in protocols.values() if one["counted"]]
    result = {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "settings": dict(settings),
        "questions": len(questions),
        "videos": len({question.video for question in questions}),
        "faults": sum(bool(question.fault) for question in questions),
        "chance": _round(chance(benchmark, questions)),
        "protocols": protocols,
        "spread": _round(max(shown) - min(shown)) if shown else 0.0,
        "groups": {
            axis: {
                name: {"score": _round(one.estimate.mean), "questions": one.questions} for name, one in found.items()
            }
            for axis, found in by_group(benchmark, marked, "strict").items()
            if any(one.questions for one in found.values())
        },
        "published": dict(benchmark.published),
        "note": benchmark.note,
    }
    controls = _controls(benchmark, questions, samples, marked)
    if needles := needle_map(marked):
        result["needles"] = needles
    marks = _judged(benchmark, questions, judged)
    return result | ({"controls": controls} if controls else {}) | ({"judged": marks} if marks else {})


def needle_map(marked: Sequence[Marked]) -> list[dict[str, Any]]:
    """For each mode, length and depth of needles: the share that was shown, and found; empty where there are none."""
    cells: dict[tuple[str, str, str], dict[str, list[tuple[bool, bool]]]] = {}
    for one in marked:
        if "needle" in one.question.row:
            groups, seen = one.question.groups, one.question.row["needle"]
            times = (one.row or {}).get("frame_times") or [[]]
            shown = bool(seen) and any(seen[0] <= second <= seen[1] for second in times[0])
            cell = cells.setdefault((groups["mode"][0], groups["length"][0], groups["depth"][0]), {})
            cell.setdefault(one.question.unit, []).append((shown, one.marks["strict"].credit == 1))
    return [
        {
            "mode": mode,
            "length": length,
            "depth": depth,
            "shown": _round(sum(all(shown for shown, _ in some) for some in units.values()) / len(units)),
            "found": _round(sum(all(right for _, right in some) for some in units.values()) / len(units)),
            "needles": len(units),
        }
        for (mode, length, depth), units in cells.items()
    ]


def _judged(benchmark: Benchmark, questions: Sequence[Question], judged: Mapping[str, Row]) -> dict[str, Any]:
    """What a judge says of open answers, in its own scale; empty where nothing is open."""
    opened = [question for question in questions if question.kind == "open"]
    if not opened:
        return {}
    said = [(q, judged[q.id]) for q in opened if q.id in judged and judged[q.id]["score"] is not None]
    axis, most = benchmark.average, max(RUBRICS[q.rubric].most for q in opened)
    strata = [q.groups[axis][0] for q, _ in said] if axis else []
    made = estimate([row["score"] for _, row in said], [q.video for q, _ in said], strata, most)
    scores: dict[str, dict[str, list[float]]] = {}
    for question, row in said:
        for name, values in question.groups.items():
            for value in values:
                scores.setdefault(name, {}).setdefault(value, []).append(row["score"])
    return {
        "judges": sorted({row["judge"] for _, row in said}),
        "rubrics": sorted({row["rubric"] for _, row in said}),
        "score": _round(made.mean),
        "low": _round(made.low),
        "high": _round(made.high),
        "most": most,
        "judged": len(said),
        "not_judged": len(opened) - len(said),
        "groups": {
            name: {
                value: {"score": _round(sum(some) / len(some)), "questions": len(some)} for value, some in found.items()
            }
            for name, found in scores.items()
        },
    }


def marked_answers(
    benchmark: Benchmark,
    questions: Sequence[Question],
    samples: Samples,
    variant: str = "",
    judged: Mapping[str, Row] | None = None,
) -> list[Marked]:
    """Every question (of a control, as it was asked there) with its stored answer and its marks."""
    asked = [rotated(question) if variant == "rotated" else question for question in questions]
    keys = ((question.id, samples.latest.get((benchmark.name, variant, question.id))) for question in asked)
    return mark_all(benchmark, asked, {name: row for name, row in keys if row is not None}, judged or {})


def _check_alike(benchmark: Benchmark, rows: Sequence[Mapping[str, Any]]) -> None:
    for what, values in (
        ("weights", {row["identity"]["weights"] for row in rows if "identity" in row}),
        ("prompts", {row["style"] for row in rows}),
    ):
        if len(values) > 1:
            raise UserError(f"{benchmark.name}: its answers are of {len(values)} {what}; let the run finish first")


def _plain(found: Score) -> dict[str, Any]:
    made, some = found.estimate, found.questions > 0
    return {
        "score": _round(made.mean) if some else None,
        "low": _round(made.low) if some else None,
        "high": _round(made.high) if some else None,
        "smallest_difference": _round(made.smallest) if some else None,
        "clusters": made.clusters,
        "counted": found.questions,
        **{name: found.failures.get(name, 0) for name in (*FAILURES, "hidden", "unjudged")},
    }


def _controls(
    benchmark: Benchmark, questions: Sequence[Question], samples: Samples, marked: Sequence[Marked]
) -> dict[str, Any]:
    """variant -> its strict score, and what the question as it stands scores more, paired."""
    found = {}
    for variant in CONTROLS:
        others = marked_answers(benchmark, questions, samples, variant)
        pairs = [
            (one, other)
            for one, other in zip(marked, others, strict=True)
            if other.row is not None and other.marks["strict"].counted and one.marks["strict"].counted
        ]
        if not pairs:
            continue
        made = score(benchmark, [other for _, other in pairs], "strict")
        credits = [[one.marks["strict"].credit for one in some] for some in zip(*pairs, strict=True)]
        difference = compare(credits[1], credits[0], [one.question.video or one.question.id for one, _ in pairs])
        both = sum(a * b for a, b in zip(*credits, strict=True)) / len(pairs)
        found[variant] = {
            "score": _round(made.estimate.mean) if made else 0.0,
            "questions": len(pairs),
            "adds": _round(difference.mean),
            "adds_low": _round(difference.low),
            "adds_high": _round(difference.high),
            "right_in_both": _round(both),
        }
    return found


def _round(value: float) -> float:
    return round(value, 6)


# ------------------------------------------------------------------------------------------- files


def write_results(folder: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write `results.json`."""
    write_json(folder / RESULTS, {"format": 1, "results": list(results)})


def write_scored(folder: Path, marked: Sequence[tuple[Benchmark, Sequence[Marked]]]) -> None:
    """Write `scored.jsonl`: each question with its answer, what each protocol reads in it, and what it is worth."""
    lines = []
    for benchmark, some in marked:
        for one in some:
            question, row = one.question, one.row or {}
            lines.append(
                json_line(
                    {
                        "benchmark": benchmark.name,
                        "id": question.id,
                        "video": question.video,
                        "question": question.text,
                        "options": list(question.options),
                        "truth": question.answer,
                        "groups": {axis: list(names) for axis, names in question.groups.items()},
                        "average": question.groups[benchmark.average][0] if benchmark.average else "",
                        "text": row.get("text", ""),
                        "failure": row.get("failure"),
                        "frame_times": row.get("frame_times", []),
                        "marks": {name: dataclasses.asdict(found) for name, found in one.marks.items()},
                    }
                )
            )
    write_bytes(folder / SCORED, b"".join(lines))


def write_submission(folder: Path, benchmark: Benchmark, marked: Sequence[Marked]) -> Path | None:
    """Write the file that the benchmark's own evaluation takes, of strict readings; None where there is none."""
    if benchmark.submission is None:
        return None
    name, value = benchmark.submission((one.question, one.marks["strict"].read) for one in marked)
    target = folder / "submissions"
    target.mkdir(exist_ok=True)
    return write_json(target / name, value)


# ------------------------------------------------------------------------------------------- lines


def lines_of(result: Mapping[str, Any]) -> list[str]:
    """A result for the terminal."""
    head = f"{result['title']}: {result['questions']:,} questions about {result['videos']:,} videos"
    lines = [f"{head}, chance {result['chance']:.1%}"]
    for name, one in result["protocols"].items():
        failures = ", ".join(f"{one[kind]:,} {kind}" for kind in (*FAILURES, "hidden", "unjudged") if one[kind])
        if not one["counted"]:
            lines.append(f"  {name:11} no score: {failures}")
            continue
        lines.append(
            f"  {name:11} {one['score']:6.1%}  (95%: {one['low']:.1%} to {one['high']:.1%}; shows differences from "
            f"{one['smallest_difference']:.1%}){'; ' if failures else ''}{failures}"
        )
    lines.append(f"  spread of the protocols {result['spread']:.1%}")
    if one := result.get("judged"):
        by = f"by {', '.join(one['judges'])}" if one["judged"] else "not judged (--judge=URL)"
        lines.append(
            f"  judged      {one['score']:6.2f} of {one['most']:g}  (95%: {one['low']:.2f} to {one['high']:.2f}) {by}; "
            f"{one['judged']:,} of {one['judged'] + one['not_judged']:,} open answers"
        )
    for mode in dict.fromkeys(cell["mode"] for cell in result.get("needles", ())):
        some = [cell for cell in result["needles"] if cell["mode"] == mode]
        told = []
        for length in dict.fromkeys(cell["length"] for cell in some):
            cells = [cell for cell in some if cell["length"] == length]
            found, shown = (sum(cell[key] for cell in cells) / len(cells) for key in ("found", "shown"))
            told.append(f"{length} {found:.0%} of {shown:.0%}")
        lines.append(f"  needles ({mode}), found of shown: {', '.join(told)}")
    for name, one in result.get("controls", {}).items():
        lines.append(
            f"  {name:11} {one['score']:6.1%}  the question as it stands adds {one['adds']:+.1%} "
            f"({one['adds_low']:+.1%} to {one['adds_high']:+.1%})"
        )
    if result["published"]:
        row = ", ".join(f"{name} {value:g}" for name, value in result["published"].items())
        lines.append(f"  Kangaroo's published row: {row}")
    return lines


def compare_runs(first: Path, second: Path, protocol: str = "strict") -> list[str]:
    """The lines that compare two runs question by question. Raises UserError: they have no questions in common."""
    rows = [_scored(folder) for folder in (first, second)]
    common = [key for key in rows[0] if key in rows[1]]
    if not common:
        raise UserError(f"{first} and {second} have no question in common")
    lines = []
    for name in dict.fromkeys(key[0] for key in common):
        pairs = [(rows[0][key], rows[1][key]) for key in common if key[0] == name]
        pairs = [p for p in pairs if all(protocol in one["marks"] and one["marks"][protocol]["counted"] for one in p)]
        if not pairs:
            lines.append(f"{name}: no question is counted under {protocol} in both")
            continue
        credits = [[one["marks"][protocol]["credit"] for one in some] for some in zip(*pairs, strict=True)]
        strata = [one["average"] for one, _ in pairs]
        made = compare(credits[0], credits[1], [one["video"] or one["id"] for one, _ in pairs], strata)
        lines.append(
            f"{name} ({protocol}): the second has {made.mean:+.1%} (95%: {made.low:+.1%} to {made.high:+.1%}, "
            f"p = {made.probability:.3g}) on {len(pairs):,} questions about {made.clusters:,} videos; better in "
            f"{made.better:,}, worse in {made.worse:,}; shows differences from {made.smallest:.1%}"
        )
    return lines


def _scored(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    path = folder / SCORED
    if not path.exists():
        raise UserError(f"{folder}: there is no {SCORED}; it is no workdir of a finished evaluation")
    rows = {}
    for where, row in read_lines(path):
        if not {"benchmark", "id", "marks", "average", "video"} <= set(row):
            raise UserError(f"{where}: is no scored question")
        rows[row["benchmark"], row["id"]] = row
    return rows
