"""`report.html` of a curated folder: one page that needs no network and no script."""

import collections
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from markupsafe import Markup

from kangaroo_jax.curation.engine import shards
from kangaroo_jax.curation.select import RULES
from kangaroo_jax.curation.stages.base import Row
from kangaroo_jax.report.histograms import histogram
from kangaroo_jax.report.page import picture, render
from kangaroo_jax.system.json_text import read_objects, utf8

_THUMBNAIL = 200  # pixels of the width
_SHOWN = 12  # clips of each verdict
_PAPER = 60e6  # videos that Kangaroo's authors began with
_OF_A_CLIP = ("mean", "median", "p95", "most")  # CPU seconds


def write_report(root: Path, settings: Mapping[str, Any], annotations: str = "") -> Path:
    """Write OUTPUT/report.html from what is there; returns its path.

    Args:
        root: the output folder, in which a choice was made.
        settings: `config.select`, whose thresholds are drawn.
        annotations: a JSONL file of captions or conversations, shown beside their clips' frames.

    Raises UserError: there are no scores or no choice.
    """
    rows = {row["id"]: row for row in shards.all_scores(root)}
    kept = [rows[entry["id"]] for entry in read_objects(root / "selected.jsonl")]
    dropped = list(read_objects(root / "dropped.jsonl"))
    result = json.loads((root / "funnel.json").read_text(encoding="utf-8"))
    found = costs(root)
    page = render(
        "curation.html",
        title="Curation",
        tiles=_tiles(result),
        funnel=funnel(result),
        scores=_scores(rows, kept, settings),
        balance=[
            pair for what in ("category", "source", "language", "licence") for pair in _balance(what, result[what])
        ],
        kept=shelf(root, [(row, "") for row in kept]),
        dropped=_dropped(root, rows, dropped),
        annotated=_annotated(root, rows, annotations),
        cost=_cost(found),
        cost_note=_cost_note(found, len(rows)),
    )
    shards.put(root, root / "report.html", utf8(page))
    return root / "report.html"


Bars = list[tuple[str, dict[str, float], str]]  # name, {series: value}, what stands beside
Clips = list[tuple[str, str, str]]  # picture, id, why it was dropped


def _tiles(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [
        ("Items", f"{result['items']:,}", "files of the input"),
        ("Clips", f"{result['clips']:,}", f"{result['seconds'] / 3600:,.2f} hours"),
        ("Kept", f"{result['kept']:,}", f"{result['kept'] / max(1, result['clips']):.0%} of the clips"),
        ("Kept video", f"{result['kept_seconds'] / 3600:,.2f} h", "in all"),
    ]


def funnel(result: Mapping[str, Any]) -> Bars:
    """What each rule dropped and left, from funnel.json."""
    rows: Bars = [("all clips", {"left": result["clips"]}, f"{result['clips']:,}")]
    for step in result["rules"]:
        note = f"−{step['dropped']:,}, {step['left']:,} left"
        rows.append((step["rule"], {"left": step["left"], "dropped": step["dropped"]}, note))
    return rows


def _scores(rows: Mapping[str, Row], kept: Sequence[Row], settings: Mapping[str, Any]) -> list[Markup]:
    names = {row["id"] for row in kept}

    def values(path: str, chosen: bool) -> list[float]:
        found = (_at(row, path) for name, row in rows.items() if (name in names) == chosen)
        return [value for value in found if value is not None]

    charts = (
        ("Text, share of the picture", "text.coverage", (settings["max_text"],), False),
        ("Faces, share of the picture", "face.coverage", (settings["max_face"],), False),
        ("Motion, % of the diagonal in 0.2 s", "motion.score", (settings["min_motion"],), True),
        ("Seconds", "seconds", (settings["min_seconds"], settings["max_seconds"]), True),
        ("Short side, pixels", "side", (settings["min_short_side"],), False),
        ("Decodable share of frames", "probe.decodable", (settings["min_decodable"],), False),
    )
    drawn = [
        histogram(title, values(path, True), values(path, False), limits, logarithmic=logarithmic)
        for title, path, limits, logarithmic in charts
    ]
    return [chart for chart in drawn if chart]


def _at(row: Row, path: str) -> float | None:
    """A score by its dotted name; None where there is none."""
    if path == "seconds":
        return (row["end"] or 0.0) - (row["start"] or 0.0) if row["kind"] == "video" and row["end"] else None
    if path == "side":
        return min(row["probe"]["width"], row["probe"]["height"]) if "probe" in row else None
    stage, key = path.split(".")
    return row.get(stage, {}).get(key)


def _balance(what: str, counts: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Bars]]:
    if set(counts) <= {""}:
        return
    most = sorted(counts.items(), key=lambda pair: -pair[1][0])[:40]
    yield (
        what.capitalize(),
        [
            (name or "none", {"before": before, "after": after}, f"{before:,} → {after:,}")
            for name, (before, after) in most
        ],
    )


# -------------------------------------------------------------------------------- pictures


def _dropped(root: Path, rows: Mapping[str, Row], dropped: Sequence[Row]) -> list[tuple[str, int, Clips]]:
    """Each rule, how many clips it dropped, and some of them."""
    by_rule = collections.defaultdict(list)
    for entry in dropped:
        by_rule[entry["rule"]].append((rows[entry["id"]], entry["reason"]))
    return [(rule, len(by_rule[rule]), shelf(root, by_rule[rule])) for rule in RULES if by_rule[rule]]


def shelf(root: Path, chosen: Sequence[tuple[Row, str]]) -> Clips:
    """Some of the clips (their scores, and why)."""
    # Ids end with a hash: their order by it is a random one that is always the same.
    shown = sorted(chosen, key=lambda pair: pair[0]["id"].rpartition("-")[2])[:_SHOWN]
    return [(thumbnail(root, row), row["id"], reason[:160]) for row, reason in shown]


def thumbnail(root: Path, row: Row, k: int | None = None) -> str:
    """The address of a key frame, by default the middle one; "" for a clip without."""
    count = len(row["keyframe_times"])
    frame = cv2.imread(str(root / "keyframes" / row["id"] / f"{count // 2 if k is None else k}.jpg")) if count else None
    if frame is None:
        return ""
    height = max(1, round(frame.shape[0] * _THUMBNAIL / frame.shape[1]))
    small = cv2.resize(frame, (_THUMBNAIL, height), interpolation=cv2.INTER_AREA)
    return picture(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes())


def _annotated(root: Path, rows: Mapping[str, Row], annotations: str) -> list[tuple[list[str], list[str]]]:
    """Frames of clips, and the captions or conversations on them."""
    cards: list[tuple[list[str], list[str]]] = []
    for entry in read_objects(annotations) if annotations else ():
        row = rows.get(str(entry.get("clip", entry.get("id"))))
        if row is None or len(cards) >= _SHOWN:
            continue
        texts = [str(entry["caption"])] if entry.get("caption") else []
        for turn in entry.get("conversations") or entry.get("messages") or ():
            texts.append(f"{turn.get('from', turn.get('role'))}: {turn.get('value', turn.get('content'))}")
        cards.append(([thumbnail(root, row, k) for k in range(len(row["keyframe_times"]))], texts))
    return cards


# ------------------------------------------------------------------------------------ cost


def costs(root: Path) -> dict[str, dict[str, float]]:
    """The costs of each stage: clips, CPU seconds a clip (mean, median, 95th percentile, most), most resident MiB."""
    result = {}
    for folder in sorted((root / "timings").glob("*")):
        found = [json.loads(file.read_bytes()) for file in folder.glob("*.json")]
        seconds = np.array([second for one in found for second in one["cpu_seconds"]])
        result[folder.name] = {
            "count": len(seconds),
            "mean": float(seconds.mean()),
            "median": float(np.median(seconds)),
            "p95": float(np.quantile(seconds, 0.95)),
            "most": float(seconds.max()),
            "memory_mib": max(one["memory_mib"] for one in found),
        }
    return result


def _cost(found: Mapping[str, Mapping[str, float]]) -> list[tuple[str, ...]]:
    return [
        (stage, f"{one['count']:,.0f}", *(f"{one[key]:.3f}" for key in _OF_A_CLIP), f"{one['memory_mib']:.0f}")
        for stage, one in found.items()
    ]


def _cost_note(found: Mapping[str, Mapping[str, float]], clips: int) -> str:
    total = sum(one["mean"] * one["count"] for one in found.values()) / max(1, clips)
    return f"{total:.2f} CPU seconds a clip; 60 million videos like these: {total * _PAPER / 3600:,.0f} core hours."
