"""Shards: parts of the input that are scored, written and resumed together.

    OUTPUT/stages/STAGE/00003-of-00008-KEY.jsonl, .done    a stage's results, a row a line
    OUTPUT/keyframes/CLIP/0.jpg ...
    OUTPUT/scores/00003-of-00008.jsonl                   all scores of the shard's clips, a line each
    OUTPUT/timings/...             seconds: with report.html, which shows them, all that differs between two runs

KEY is a hash of the items (with the size and time of their files), of the stage's settings and the version of its
code, and of the keys of the stages that it follows. So a file under its name is exactly what a new run would write.
Files are written in OUTPUT/stages/tmp, flushed to disk and renamed; `.done` is written last.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.curation.engine.manifest import FOLDERS, Item, is_output, item_state
from kangaroo_jax.curation.stages.base import Row, Settings, Stage
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.json_text import read_objects, utf8


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of the items."""

    name: str  # 00003-of-00008
    items: tuple[Item, ...]
    key: str  # a hash of the items and the state of their files


def make_shards(items: Sequence[Item], most: int) -> list[Shard]:
    """Items spread over shards by the hash of their ids: `most` items at most on average, and about 32 shards at least.

    An item added later falls into one of the shards, and only that one changes (until their number doubles).
    """
    count = 1
    while count * min(most, max(1, len(items) // 32)) < len(items):
        count *= 2
    parts: list[list[Item]] = [[] for _ in range(count)]
    for item in items:
        parts[int(hashlib.sha256(item["id"].encode()).hexdigest()[:8], 16) % count].append(item)
    names = [f"{number:05d}-of-{count:05d}" for number in range(count)]
    return [Shard(name, tuple(part), item_state(part)) for name, part in zip(names, parts, strict=True) if part]


def stage_keys(shard: Shard, stages: Sequence[Stage], config: Settings) -> dict[str, str]:
    """The key of each stage for a shard."""
    keys: dict[str, str] = {}
    for stage in stages:
        parents = [keys[name] for name in stage.after] or [shard.key]
        parts = [stage.name, stage.version, config.get(stage.name, {}), parents]
        keys[stage.name] = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
    return keys


# ----------------------------------------------------------------------------------- files


def put(root: Path, target: Path, data: bytes) -> None:
    """Write a file that exists whole or not at all, even after a crash of the machine."""
    temporary = root / "stages" / "tmp" / uuid.uuid4().hex
    temporary.parent.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)


def put_rows(root: Path, target: Path, rows: Iterable[Row], done: Row) -> None:
    """Write rows as JSONL, then the file's marker."""
    put(root, target, lines(rows))
    put(root, marker(target), (json.dumps(done, sort_keys=True) + "\n").encode())


def lines(rows: Iterable[Row]) -> bytes:
    """JSONL with sorted keys: equal rows are equal bytes."""
    return utf8("".join(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows))


def marker(target: Path) -> Path:
    """The marker file that says that another file is whole and final."""
    return target.with_suffix(".done")


def done(target: Path) -> Row | None:
    """The contents of a file's marker, None if there is none."""
    try:
        return json.loads(marker(target).read_bytes())
    except (OSError, ValueError):
        return None


def stage_file(root: Path, stage: str, shard: str, key: str) -> Path:
    """The path of a stage's results for a shard."""
    return root / "stages" / stage / f"{shard}-{key}.jsonl"


def score_file(root: Path, shard: str) -> Path:
    """The path of a shard's scores."""
    return root / "scores" / f"{shard}.jsonl"


def all_scores(root: Path) -> Iterator[Row]:
    """Every row of OUTPUT/scores, shard by shard. Raises UserError: there are none."""
    for file in score_files(root):
        yield from read_objects(file)


def score_files(root: Path) -> list[Path]:
    """The files of OUTPUT/scores. Raises UserError: there are none."""
    files = sorted((root / "scores").glob("*.jsonl"))
    if not files:
        raise UserError(f"{root}: no scores here; run kangaroo curate --input=... --output={root} first")
    return files


@contextlib.contextmanager
def claimed(root: Path) -> Iterator[None]:
    """Lock the folder for this run, and remove the temporary files of a killed run.

    Raises UserError: it cannot be written, another run is writing there, or it holds folders of other programs.
    """
    foreign = next((name for name in FOLDERS if (root / name).exists()), None)
    if foreign and not is_output(root):
        raise UserError(f"{root}: has a folder {foreign!r} that is not of kangaroo curate; give another --output")
    try:
        (root / "stages").mkdir(parents=True, exist_ok=True)
        file: Any = open(root / "stages" / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{root}: cannot be written ({error.strerror or error})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{root}: another run is writing here; wait for it, or give another --output") from None
        shutil.rmtree(root / "stages" / "tmp", ignore_errors=True)
        yield
        shutil.rmtree(root / "stages" / "tmp", ignore_errors=True)
