"""`report.html`: the results of a curriculum as one page that needs no network and no script.

`write_report(path, data)` takes a plain dictionary. Only `title` and `stages` are needed; a part whose key is
missing or empty is left out. Shares are from 0 to 1, times of frames are seconds, frames are the bytes of PNG
or JPEG files.

    {
      "title": str,
      "lead": str,                          a sentence below the title
      "seconds": float,                     of the whole run
      "peak_rss_gib": float,
      "chance": float,                      of a multiple-choice question
      "stages": [{                          in order; a text warm-up may come first
        "name": str, "steps": int, "seconds": float,
        "losses": [[step, loss], ...],      steps count anew in each stage
        "metrics": {name: share},           short_mcq, long_mcq, image_mcq, open_exact, en_mcq, zh_mcq, ...
        "by_kind": {"group/kind": {"accuracy": share, "count": int}},
        "useful_token_share": float,
      }],
      "samples": [{"frames": [bytes], "times": [float], "question": str, "options": [str], "answer": str,
                   "truth": str, "language": str, "kind": str, "correct": bool}],
      "chats": [{"title": str, "frames": [bytes], "times": [float], "turns": [(role, text)]}],
      "ablations": [{"name": str, "metrics": {name: share}, any other key: any value}],
      "sections": [str],                    more of the page as HTML
      "environment": {name: value},         the key "commands" may hold a list of command lines
    }

`answer` and `truth` of a multiple-choice sample are letters, `options` their texts in order.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kangaroo_jax.evaluation.extraction.strict import LETTERS, extract_letter
from kangaroo_jax.report.charts import bar_chart, loss_chart, stage_label
from kangaroo_jax.report.page import picture, render
from kangaroo_jax.system.files import write_text

NAMES = {
    "short": "Short clips",
    "long": "Long videos",
    "image": "Images",
    "short_mcq": "Short clips",
    "long_mcq": "Long videos",
    "image_mcq": "Images",
    "open_exact": "Open questions",
    "en_mcq": "English",
    "zh_mcq": "Chinese",
    "mcq": "Multiple choice",
    "open": "Open",
    "second_t": "at second t",
}
CHARTED = ("short_mcq", "long_mcq", "open_exact")


def write_report(path: str | Path, data: Mapping[str, Any]) -> Path:
    """Write the page for `data` (see the top of this module) to `path`, in one step. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_text(path, render_report(data))


def render_report(data: Mapping[str, Any]) -> str:
    """The page for `data` as HTML text. Raises ValueError where a frame is neither PNG nor JPEG."""
    stages, chance = data["stages"], data.get("chance")
    both = [stage for stage in _evaluated(stages) if "en_mcq" in stage["metrics"] and "zh_mcq" in stage["metrics"]]
    commands = (data.get("environment") or {}).get("commands") or ()
    return render(
        "quickstart.html",
        title=data["title"],
        lead=data.get("lead"),
        chance=chance,
        tiles=_tiles(data),
        losses=loss_chart([(s["name"], s["steps"], [tuple(pair) for pair in s.get("losses") or ()]) for s in stages]),
        training=[_training(stage) for stage in stages],
        accuracy=_chart(_evaluated(stages), CHARTED, chance),
        asked=[stage_label(stage["name"]) for stage in stages if stage.get("by_kind")],
        kinds=_kinds([stage["by_kind"] for stage in stages if stage.get("by_kind")]),
        languages=_chart(both, ("en_mcq", "zh_mcq"), chance, height=220),
        samples=[_sample(sample) for sample in data.get("samples") or ()],
        chats=[{**chat, "pictures": _pictures(chat)} for chat in data.get("chats") or ()],
        ablations=_ablations(data.get("ablations") or ()),
        sections=[Markup(section) for section in data.get("sections") or ()],
        environment=[(key, value) for key, value in (data.get("environment") or {}).items() if key != "commands"],
        commands=[commands] if isinstance(commands, str) else list(commands),
    )


def _name(key: str) -> str:
    return NAMES.get(key, key.replace("_", " "))


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _evaluated(stages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [stage for stage in stages if stage.get("metrics")]


def _pictures(shown: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Frames and their seconds."""
    pairs = zip(shown.get("frames") or (), shown.get("times") or (), strict=True)
    return [(picture(frame), f"{seconds:.1f}".removesuffix(".0") + " s") for frame, seconds in pairs]


def _tiles(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    stages = _evaluated(data["stages"])
    metrics = stages[-1]["metrics"] if stages else {}
    chance = data.get("chance")
    against = "multiple choice" + (f", chance {chance:.0%}" if chance is not None else "")
    tiles = [(_name(key), _percent(metrics[key]), against) for key in ("short_mcq", "long_mcq") if key in metrics]
    if "open_exact" in metrics:
        tiles.append(("Open questions", _percent(metrics["open_exact"]), "exact match"))
    if "en_mcq" in metrics and "zh_mcq" in metrics:
        gap = 100 * (metrics["zh_mcq"] - metrics["en_mcq"])
        pair = f"points from English: {_percent(metrics['zh_mcq'])} and {_percent(metrics['en_mcq'])}"
        tiles.append(("Chinese", f"{gap:+.1f}".replace("-", "−"), pair))
    if "seconds" in data:
        tiles.append(("Time", _duration(data["seconds"]), "the whole run"))
    if "peak_rss_gib" in data:
        tiles.append(("Memory", f"{data['peak_rss_gib']:.1f} GiB", "at the peak"))
    return tiles


def _training(stage: Mapping[str, Any]) -> tuple[str, ...]:
    losses = stage.get("losses") or ()
    last = [loss for _, loss in losses[-10:]]
    return (
        stage_label(stage["name"]),
        f"{stage['steps']:,}",
        _duration(stage["seconds"]) if "seconds" in stage else "–",
        f"{losses[0][1]:.3f}" if losses else "–",
        f"{sum(last) / len(last):.3f}" if last else "–",
        _percent(stage.get("useful_token_share")),
    )


def _chart(
    stages: Sequence[Mapping[str, Any]], keys: Sequence[str], chance: float | None, height: float = 260
) -> Markup | None:
    """Bars of the metrics that some stage has; None without a stage."""
    keys = [key for key in keys if any(key in stage["metrics"] for stage in stages)]
    series = [(_name(key), [stage["metrics"].get(key) for stage in stages]) for key in keys]
    return bar_chart([stage["name"] for stage in stages], series, chance, height) if stages else None


def _kinds(stages: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, int, list[float | None]]]]]:
    """(group, [(kind, how many were asked, share of right answers in each stage)])."""
    kinds = sorted({kind for stage in stages for kind in stage}, key=lambda k: k.rpartition("/")[::2])
    groups = []
    for above, inside in itertools.groupby(kinds, key=lambda kind: kind.rpartition("/")[0]):
        first, *rest = (_name(part) for part in above.split("/"))
        rows = []
        for kind in inside:
            found = [stage.get(kind, {}) for stage in stages]
            shares = [one.get("accuracy") for one in found]
            rows.append((_name(kind.rpartition("/")[2]), max(one.get("count", 0) for one in found), shares))
        groups.append((", ".join([first, *(part.lower() for part in rest)]), rows))
    return groups


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    options = list(sample.get("options") or ())
    said = extract_letter(sample["answer"], LETTERS[: len(options)], options) if options else ""
    listed = []
    for letter, option in zip(LETTERS, options, strict=False):
        listed.append(("good" if letter == sample["truth"] else "bad" if letter == said else "", letter, option))
    question = sample["question"]
    language = {"en": "English", "zh": "Chinese"}.get(sample["language"], sample["language"])
    return {
        **sample,
        "pictures": _pictures(sample),
        "tags": (_name(sample["kind"]), language),
        "question": question.split("\nA")[0] if options else question,  # it may hold the options, which are listed
        "options": listed,
    }


def _ablations(ablations: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A table, its heading first; [] without one."""
    if not ablations:
        return []
    metrics = list(dict.fromkeys(key for row in ablations for key in row.get("metrics", {})))
    others = list(dict.fromkeys(key for row in ablations for key in row if key not in ("name", "metrics")))
    rows = [["Model", *map(_name, metrics), *map(_name, others)]]
    for row in ablations:
        shares = [_percent(row.get("metrics", {}).get(key)) for key in metrics]
        values = [row.get(key, "–") for key in others]
        rows.append([row["name"], *shares, *(f"{v:,.1f}" if isinstance(v, float) else str(v) for v in values)])
    return rows
