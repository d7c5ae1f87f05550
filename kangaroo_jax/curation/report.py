"""`report.html` of a curated folder: one page that needs no network and no script."""

import base64
import collections
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from kangaroo_jax.curation.engine import shards
from kangaroo_jax.curation.select import RULES
from kangaroo_jax.curation.stages.base import Row
from kangaroo_jax.errors import STEERS
from kangaroo_jax.report.charts import escape
from kangaroo_jax.report.histograms import bars, histogram
from kangaroo_jax.report.style import STYLE
from kangaroo_jax.system.json_text import read_lines, read_objects, utf8

_THUMBNAIL = 200  # pixels of the width
_SHOWN = 12  # clips of each verdict
_PAPER = 60e6  # videos that Kangaroo's authors began with
_COLOURS = {"before": "--c6", "after": "--c1", "left": "--c1", "dropped": "--c2"}


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
    sections = [
        _header(result),
        _section("Funnel", "Each clip counts at the first rule that it fails, in this order.", funnel_bars(result)),
        _section("Scores", "Blue is kept, orange dropped; dashed is the limit.", _scores(rows, kept, settings)),
        *(_balance(what, result[what]) for what in ("category", "source", "language", "licence")),
        _section("Kept", "Some of them, by the hash of their ids.", gallery(root, [(row, "") for row in kept])),
        *_galleries(root, rows, dropped),
        _annotated(root, rows, annotations),
        _section("Cost", "CPU seconds of one core, of what was computed in this folder.", _cost(root, len(rows))),
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Curation</title>\n<style>{STYLE}{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n<footer>Written by kangaroo_jax. This file holds all that it shows.</footer>\n</main>\n</body>\n</html>\n"
    )
    shards.put(root, root / "report.html", utf8(STEERS.sub("\ufffd", page)))
    return root / "report.html"


_STYLE = """
.shelf { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px; }
.shelf figure { margin: 0; font-size: 12px; overflow-wrap: anywhere; }
.shelf img { display: block; width: 100%; border-radius: 6px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 12px; }
.charts svg { min-width: 0; }
"""


def _section(title: str, lead: str, body: str) -> str:
    if not body:
        return ""
    head = f'<h2>{escape(title)}</h2>\n<p class="lead">{escape(lead)}</p>'
    return f'<section>\n{head}\n<div class="card">{body}</div>\n</section>'


def _header(result: Mapping[str, Any]) -> str:
    tiles = (
        ("Items", f"{result['items']:,}", "files of the input"),
        ("Clips", f"{result['clips']:,}", f"{result['seconds'] / 3600:,.2f} hours"),
        ("Kept", f"{result['kept']:,}", f"{result['kept'] / max(1, result['clips']):.0%} of the clips"),
        ("Kept video", f"{result['kept_seconds'] / 3600:,.2f} h", "in all"),
    )
    body = "".join(
        f'<div class="tile"><span class="name">{name}</span><b>{value}</b><span>{note}</span></div>'
        for name, value, note in tiles
    )
    lead = "What was found in the input, what was kept of it, and why the rest was not. The thresholds are ours."
    return f'<header>\n<h1>Curation</h1>\n<p class="lead">{lead}</p>\n<div class="tiles">{body}</div>\n</header>'


def funnel_bars(result: Mapping[str, Any]) -> str:
    """What each rule dropped and left, as bars (HTML), from funnel.json."""
    rows: list[tuple[str, dict[str, float], str]] = [("all clips", {"left": result["clips"]}, f"{result['clips']:,}")]
    for step in result["rules"]:
        note = f"−{step['dropped']:,}, {step['left']:,} left"
        rows.append((step["rule"], {"left": step["left"], "dropped": step["dropped"]}, note))
    return bars(rows, _COLOURS)


def _scores(rows: Mapping[str, Row], kept: Sequence[Row], settings: Mapping[str, Any]) -> str:
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
    return f'<div class="charts">{"".join(f"<div>{chart}</div>" for chart in drawn if chart)}</div>'


def _at(row: Row, path: str) -> float | None:
    """A score by its dotted name; None where there is none."""
    if path == "seconds":
        return (row["end"] or 0.0) - (row["start"] or 0.0) if row["kind"] == "video" and row["end"] else None
    if path == "side":
        return min(row["probe"]["width"], row["probe"]["height"]) if "probe" in row else None
    stage, key = path.split(".")
    return row.get(stage, {}).get(key)


def _balance(what: str, counts: Mapping[str, Sequence[int]]) -> str:
    if set(counts) <= {""}:
        return ""
    most = sorted(counts.items(), key=lambda pair: -pair[1][0])[:40]
    rows = [
        (name or "none", {"before": before, "after": after}, f"{before:,} → {after:,}")
        for name, (before, after) in most
    ]
    return _section(what.capitalize(), "Clips before (grey) and after (blue).", bars(rows, _COLOURS))


# -------------------------------------------------------------------------------- pictures


def _galleries(root: Path, rows: Mapping[str, Row], dropped: Sequence[Row]) -> list[str]:
    """Clips that each rule dropped."""
    by_rule = collections.defaultdict(list)
    for entry in dropped:
        by_rule[entry["rule"]].append((rows[entry["id"]], entry["reason"]))
    return [
        _section(f"Dropped: {rule}", f"{len(by_rule[rule]):,} clips.", gallery(root, by_rule[rule]))
        for rule in RULES
        if by_rule[rule]
    ]


def gallery(root: Path, chosen: Sequence[tuple[Row, str]]) -> str:
    """Some of the clips (their scores, and why) as pictures with captions (HTML)."""
    # Ids end with a hash: their order by it is a random one that is always the same.
    shown = sorted(chosen, key=lambda pair: pair[0]["id"].rpartition("-")[2])[:_SHOWN]
    figures = [
        f"<figure>{thumbnail(root, row)}<figcaption>{escape(row['id'])}"
        f"{'<br><b>' + escape(reason[:160]) + '</b>' if reason else ''}</figcaption></figure>"
        for row, reason in shown
    ]
    return f'<div class="shelf">{"".join(figures)}</div>' if figures else ""


def thumbnail(root: Path, row: Row, k: int | None = None) -> str:
    """A key frame, by default the middle one; nothing for a clip without."""
    count = len(row["keyframe_times"])
    picture = (
        cv2.imread(str(root / "keyframes" / row["id"] / f"{count // 2 if k is None else k}.jpg")) if count else None
    )
    if picture is None:
        return ""
    height = max(1, round(picture.shape[0] * _THUMBNAIL / picture.shape[1]))
    small = cv2.resize(picture, (_THUMBNAIL, height), interpolation=cv2.INTER_AREA)
    data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(data).decode()}" alt="key frame">'


def _annotated(root: Path, rows: Mapping[str, Row], annotations: str) -> str:
    """Captions or conversations beside the frames of their clips."""
    cards: list[str] = []
    for _, entry in read_lines(Path(annotations)) if annotations else ():
        row = rows.get(str(entry.get("clip", entry.get("id"))))
        if row is None or len(cards) >= _SHOWN:
            continue
        frames = "".join(f"<figure>{thumbnail(root, row, k)}</figure>" for k in range(len(row["keyframe_times"])))
        texts = [str(entry["caption"])] if entry.get("caption") else []
        for turn in entry.get("conversations") or entry.get("messages") or ():
            texts.append(f"{turn.get('from', turn.get('role'))}: {turn.get('value', turn.get('content'))}")
        body = "".join(f"<p>{escape(text)}</p>" for text in texts)
        cards.append(f'<div class="card"><div class="frames">{frames}</div>{body}</div>')
    return _section(
        "Annotations",
        "Written for clips that were kept.",
        f'<div class="samples">{"".join(cards)}</div>' if cards else "",
    )


# ------------------------------------------------------------------------------------ cost


def costs(root: Path) -> dict[str, dict[str, float]]:
    """Of each stage: clips, CPU seconds of a clip (mean, median, 95th percentile, most), resident MiB at most."""
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


def _cost(root: Path, clips: int) -> str:
    found = costs(root)
    if not found:
        return ""
    head = "".join(f'<th class="number">{name}</th>' for name in ("clips", "mean", "median", "95%", "most", "MiB"))
    lines = [
        f"<tr><td>{escape(stage)}</td>"
        + "".join(
            f'<td class="number">{one[key]:{form}}</td>'
            for key, form in (
                ("count", ",.0f"),
                ("mean", ".3f"),
                ("median", ".3f"),
                ("p95", ".3f"),
                ("most", ".3f"),
                ("memory_mib", ".0f"),
            )
        )
        + "</tr>"
        for stage, one in found.items()
    ]
    total = sum(one["mean"] * one["count"] for one in found.values()) / max(1, clips)
    note = f"{total:.2f} CPU seconds a clip; 60 million videos like these: {total * _PAPER / 3600:,.0f} core hours."
    return f'<table class="plain"><tr><th>stage</th>{head}</tr>{"".join(lines)}</table><p class="verdict">{note}</p>'
