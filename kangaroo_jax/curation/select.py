"""`kangaroo curate select`: chooses clips by their scores; each dropped clip gets the first rule that it fails.

The rules, in order, are broken, seconds, size, text, face, motion, language (thresholds); duplicate (the best video of
a group is kept, see `_WORTH`); category (a cap), source (a quota). Caps keep the clips with the lowest hashes of
their ids, so that the choice is reproducible.
"""

import collections
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.curation import duplicates
from kangaroo_jax.curation.engine import shards
from kangaroo_jax.curation.stages.base import Row
from kangaroo_jax.system.json_text import parse_json, utf8

RULES = ("broken", "seconds", "size", "text", "face", "motion", "language", "duplicate", "category", "source")
SETTINGS = "select.json"  # the settings of the last choice, beside selected.jsonl
Settings = Mapping[str, Any]
Verdict = tuple[str, str]  # the rule and the reason


def select(root: Path, settings: Settings) -> dict[str, Any]:
    """Write OUTPUT/selected.jsonl, dropped.jsonl, funnel.json and select.json (the settings); returns the funnel.

    Raises UserError: there are no scores.
    """
    rows = list(shards.all_scores(root))
    verdicts = judge(rows, settings)
    kept, dropped = [], []
    for row, verdict in zip(rows, verdicts, strict=True):
        entry = _entry(row, settings)
        if verdict is None:
            kept.append(entry)
        else:
            dropped.append({**entry, "rule": verdict[0], "reason": verdict[1]})
    result = funnel(rows, verdicts, settings)
    shards.put(root, root / "selected.jsonl", shards.lines(kept))
    shards.put(root, root / "dropped.jsonl", shards.lines(dropped))
    shards.put(root, root / "funnel.json", utf8(json.dumps(result, indent=1, ensure_ascii=False) + "\n"))
    shards.put(root, root / SETTINGS, utf8(json.dumps(dict(settings), indent=1, ensure_ascii=False) + "\n"))
    return result


def last_settings(root: Path) -> dict[str, Any] | None:
    """The settings of the choice in a folder, None if none are stored."""
    file = root / SETTINGS
    return parse_json(file.read_bytes(), str(file)) if file.exists() else None


def judge(rows: Sequence[Row], settings: Settings) -> list[Verdict | None]:
    """The verdict of each row, None for rows that are kept."""
    verdicts = [threshold_verdict(row, settings) for row in rows]
    if settings["duplicates"]:
        _judge_duplicates(rows, verdicts, settings)
    caps: dict[str, int | None] = collections.defaultdict(lambda: settings["category_cap"] or None)
    _judge_caps(rows, verdicts, "category", lambda row: category_of(row, settings), caps, settings["seed"])
    quotas = dict(settings["source_quotas"])
    _judge_caps(rows, verdicts, "source", lambda row: row["source"], quotas, settings["seed"])
    return verdicts


def threshold_verdict(row: Row, settings: Settings) -> Verdict | None:
    """The first threshold that a row fails by its own scores."""
    if row["failures"]:
        stage, reason = next(iter(row["failures"].items()))
        return "broken", f"{stage}: {reason}"
    probe = row["probe"]
    decodable = min(probe["decodable"], row.get("cuts", {}).get("decodable", 1.0))
    video = row["kind"] == "video"
    seconds = (row["end"] or 0.0) - (row["start"] or 0.0)
    text = row.get("text", {}).get("coverage", 0.0)
    face = row.get("face", {}).get("coverage", 0.0)
    motion = row.get("motion", {}).get("score")
    side = min(probe["width"], probe["height"])
    language = language_of(row)
    least = {name: settings[f"min_{name}"] for name in ("decodable", "seconds", "short_side", "motion")}
    most = {name: settings[f"max_{name}"] for name in ("seconds", "text", "face")}
    long, moves = f"{seconds:.1f} s", f"{motion or 0:.4f}% of the diagonal"
    checks = (
        ("broken", decodable < least["decodable"], f"{decodable:.0%} of its frames can be decoded", "min_decodable"),
        ("seconds", video and seconds < least["seconds"], long, "min_seconds"),
        ("seconds", video and seconds > most["seconds"], long, "max_seconds"),
        ("size", side < least["short_side"], f"{probe['width']}x{probe['height']} pixels", "min_short_side"),
        ("text", text > most["text"], f"{text:.1%} of the picture", "max_text"),
        ("face", face > most["face"], f"{face:.1%} of the picture", "max_face"),
        ("motion", video and motion is None, "no two frames to compare", ""),
        ("motion", video and motion is not None and motion < least["motion"], moves, "min_motion"),
        ("language", bool(settings["languages"] and language) and language not in settings["languages"], language, ""),
    )
    for rule, failed, found, key in checks:
        if failed:
            return rule, f"{found}{_limit(key, settings)}"
    return None


def _limit(key: str, settings: Settings) -> str:
    """The limit that a score is beyond, for the reason's text."""
    if not key:
        return ""
    return f", {'under' if key.startswith('min_') else 'over'} {key} {settings[key]:g}"


def language_of(row: Row) -> str:
    """The caption's language: as declared, else as detected, "" if there is none."""
    return row["language"] or row.get("caption_language", {}).get("code", "")


def category_of(row: Row, settings: Settings) -> str:
    """The category: as declared, else the first one with a keyword in the caption, else ""."""
    if row["category"]:
        return row["category"]
    caption = row["caption"].lower()
    return next((name for name, words in settings["category_keywords"] if any(w.lower() in caption for w in words)), "")


def _judge_duplicates(rows: Sequence[Row], verdicts: list[Verdict | None], settings: Settings) -> None:
    """Drop near-duplicates. Only kept clips are compared, so that a dropped clip does not displace another."""
    kept = [i for i, verdict in enumerate(verdicts) if verdict is None]
    found = duplicates.groups(
        [rows[i] for i in kept],
        most_bits=settings["duplicate_bits"],
        tables=settings["duplicate_tables"],
        share=settings["duplicate_share"],
        mirror=settings["duplicate_mirror"],
        flat=settings["duplicate_flat"],
        most_seconds=settings["duplicate_seconds"],
        least_cosine=settings["duplicate_cosine"],
    )
    members: dict[int, list[int]] = collections.defaultdict(list)
    for i, first in zip(kept, found, strict=True):
        members[first].append(i)
    for group in members.values():
        best = min(group, key=lambda i: (*(-worth(rows[i]) for _, worth in _WORTH), rows[i]["id"]))
        for i in group:
            if rows[i]["item"] != rows[best]["item"]:
                verdicts[i] = ("duplicate", f"of {rows[best]['id']}, {_better(rows[best], rows[i])}")


# Criteria for the best of a group; the first that differs decides, else the id.
_WORTH: tuple[tuple[str, Callable[[Row], float]], ...] = (
    ("has more pixels", lambda row: row["probe"]["width"] * row["probe"]["height"]),
    ("names its category", lambda row: bool(row["category"])),
    ("has a caption", lambda row: bool(row["caption"])),
    ("is longer", lambda row: (row["end"] or 0.0) - (row["start"] or 0.0)),
    ("is sharper", lambda row: sum(row.get("keyframes", {}).get("sharpness", ()))),
)


def _better(best: Row, other: Row) -> str:
    """The reason that the best of a group is better than another."""
    reason = next((what for what, worth in _WORTH if worth(best) > worth(other)), "is the same; its id comes first")
    return f"which {reason}"


def _judge_caps(
    rows: Sequence[Row],
    verdicts: list[Verdict | None],
    rule: str,
    name_of: Callable[[Row], str],
    most: Mapping[str, int | None],
    seed: int,
) -> None:
    """Thin each name (category or source) to its cap. Clips without a category form one category."""
    members: dict[str, list[int]] = collections.defaultdict(list)
    for i, verdict in enumerate(verdicts):
        if verdict is None:
            members[name_of(rows[i])].append(i)
    for name, indices in members.items():
        cap = most[name] if name in most or isinstance(most, collections.defaultdict) else None
        if cap is None or len(indices) <= cap:
            continue
        indices.sort(key=lambda i: hashlib.sha256(f"{seed} {rows[i]['id']}".encode()).digest())
        for i in indices[cap:]:
            verdicts[i] = (rule, f"{name or 'no category'} has {len(indices)}, {cap} are kept")


def _entry(row: Row, settings: Settings) -> Row:
    """A line of selected.jsonl."""
    start = row["start"] or 0.0
    times = [round(start + seconds, 3) for seconds in row["keyframe_times"]]  # in the medium, like start and end
    frames = [{"path": f"keyframes/{row['id']}/{k}.jpg", "time": time} for k, time in enumerate(times)]
    keys = ("id", "kind", "start", "end", "caption", "source", "licence", "source_id")
    entry = {key: row[key] for key in keys}
    if row["kind"] == "image":
        entry["start"] = entry["end"] = None
    return {
        **entry,
        "media": row["path"],
        "keyframes": frames,
        "category": category_of(row, settings),
        "language": language_of(row),
    }


def funnel(rows: Sequence[Row], verdicts: Sequence[Verdict | None], settings: Settings) -> dict[str, Any]:
    """Counts of items and clips, of clips left after each rule, and by category, source and language."""
    rules = collections.Counter(verdict[0] for verdict in verdicts if verdict is not None)
    left, steps = len(rows), []
    for rule in RULES:
        left -= rules[rule]
        steps.append({"rule": rule, "dropped": rules[rule], "left": left})
    result: dict[str, Any] = {"items": len({row["item"] for row in rows}), "clips": len(rows), "kept": left}
    result["seconds"] = round(sum(_seconds(row) for row in rows), 1)
    kept = [row for row, verdict in zip(rows, verdicts, strict=True) if verdict is None]
    result["kept_seconds"] = round(sum(_seconds(row) for row in kept), 1)
    result["rules"] = steps
    names = {"category": lambda row: category_of(row, settings), "source": lambda row: row["source"]}
    for what, name_of in {**names, "language": language_of, "licence": lambda row: row["licence"]}.items():
        before = collections.Counter(name_of(row) for row in rows)
        after = collections.Counter(name_of(row) for row in kept)
        result[what] = {name: [count, after[name]] for name, count in sorted(before.items())}
    return result


def _seconds(row: Row) -> float:
    return (row["end"] or 0.0) - (row["start"] or 0.0)


def table(result: Mapping[str, Any]) -> str:
    """The funnel for a terminal."""
    lines = [f"{result['items']:,} items, {result['clips']:,} clips"]
    lines += [f"  {step['rule']:10}{-step['dropped']:>10,}{step['left']:>12,}" for step in result["rules"]]
    lines.append(f"kept {result['kept']:,} clips, {result['kept_seconds'] / 3600:.2f} h of video")
    if result["clips"] and not result["kept"]:
        most = max(result["rules"], key=lambda step: step["dropped"])["rule"]
        lines.append(
            f"most were dropped by the rule {most}: dropped.jsonl has the reason of each, config.select the limits"
        )
    return "\n".join(lines)
