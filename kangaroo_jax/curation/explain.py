"""`kangaroo curate explain`: one clip's scores and verdicts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kangaroo_jax.curation import select
from kangaroo_jax.curation.engine import shards
from kangaroo_jax.curation.stages.base import Row
from kangaroo_jax.data.media.storage import absolute
from kangaroo_jax.errors import UserError, printable
from kangaroo_jax.system.progress import Tell


def explain(root: Path, name: str, settings: dict[str, Any], tell: Tell = print) -> None:
    """Print all scores of the clips that `name` names (an id, its beginning, or a path) and the verdict of each.

    A whole name has precedence: `bikes.mp4` does not match `four bikes.mp4` if there is a `bikes.mp4`.

    Raises UserError: no clip matches, or several do.
    """
    rows = list(shards.all_scores(root))
    ways: tuple[Callable[[dict[str, Any]], bool], ...] = (
        lambda row: row["id"] == name,
        lambda row: row["item"] == name,
        lambda row: row["path"] == absolute(name),
        lambda row: row["path"].endswith(f"/{name}"),
        lambda row: row["path"].endswith(name) or row["id"].startswith(name),
    )
    found = next(filter(None, ([row for row in rows if way(row)] for way in ways)), [])
    if not found:
        raise UserError(f"curate explain: no clip {name!r} in {root}; ids are in its selected.jsonl and dropped.jsonl")
    if len({row["item"] for row in found}) > 1:
        raise UserError(f"curate explain: {name!r} may be {', '.join(row['id'] for row in found[:5])}; give one id")
    verdicts = dict(zip((row["id"] for row in rows), select.judge(rows, settings), strict=True))
    for row in found:
        verdict = verdicts[row["id"]]
        outcome = "kept" if verdict is None else f"dropped by the rule {verdict[0]}: {verdict[1]}"
        tell(printable(f"{row['id']}: {outcome}"))
        for line in _described(row, settings):
            tell(f"  {printable(line)}")


def _described(row: Row, settings: dict[str, Any]) -> list[str]:
    limits = {"text": f"at most {settings['max_text']}", "face": f"at most {settings['max_face']}"}
    limits |= {
        "motion": f"at least {settings['min_motion']}",
        "probe": f"decodable at least {settings['min_decodable']}",
    }
    head = ("path", "kind", "start", "end", "caption", "category", "language", "source", "licence")
    lines = [f"{key:12} {row[key]}" for key in head if row[key] not in ("", None)]
    for stage, scores in row.items():
        if isinstance(scores, dict) and stage != "failures":
            shown = {key: value for key, value in scores.items() if key not in ("keys", "vector")}
            limit = f"   [{limits[stage]}]" if stage in limits else ""
            lines.append(f"{stage:12} {json.dumps(shown, ensure_ascii=False)}{limit}")
    return lines + [f"{stage:12} FAILED: {reason}" for stage, reason in row["failures"].items()]
