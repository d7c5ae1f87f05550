"""What a run's folder may be: no place of the data or of the base, and of no other run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.errors import UserError
from kangaroo_jax.training.finishing import ADAPTER

_MOVED = ("video", "image")  # keys of a record that change where media are moved


def files_of(workdir: Path) -> dict[str, Path]:
    """Where a run keeps what it trains on, what is held out, and what of that is asked."""
    return {name: workdir / "data" / f"{name}.jsonl" for name in ("train", "held_out", "questions")}


def check_place(workdir: Path, base: Path, data: Sequence[str], replay: Sequence[str]) -> None:
    """Raise UserError if the run would write over its base or its data, or the base is no whole model."""
    found = reading.refuse_adapter(reading.find(base))
    there = workdir.resolve()
    stage = found.parent.parent if found.parent.name == "checkpoints" else found.parent
    if there in (base.resolve(), found, found.parent, stage):
        raise UserError(f"--workdir={workdir}: is the folder of the base; give another")
    for path in filter(None, data):
        if Path(path).is_dir() and Path(path).resolve() in (there, *there.parents):
            raise UserError(f"--workdir={workdir}: is in the folder of the data, {path}; give one beside it")
    written = {file.resolve() for file in files_of(workdir).values()}
    for path in filter(None, (*data, *replay)):
        if Path(path).resolve() in written:
            raise UserError(f"{path}: is written anew by a run in {workdir}; give another --workdir, or a copy of it")
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: is a file; give a folder")


def begun(workdir: Path) -> bool:
    """Whether an earlier call trained here."""
    return any((workdir / name).is_dir() for name in ("checkpoints", ADAPTER))


def check_run(workdir: Path, texts: Mapping[str, str]) -> None:
    """Raise UserError if `workdir` holds a run that did not learn these examples, or hold out these.

    `texts`: what its files should hold; media may have been moved since.
    """
    if not begun(workdir):
        return
    for name in ("train", "held_out"):
        file = files_of(workdir)[name]
        if not file.is_file():
            raise UserError(f"{workdir}: holds another run, without {file.name}; give another --workdir")
        if _records(file.read_text(encoding="utf-8")) != _records(texts[name]):
            raise UserError(
                f"{workdir}: holds a run with other examples ({file}); give the same data, --held-out and --seed to go "
                "on with it, or another --workdir"
            )


def _records(text: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in text.split("\n") if line]
    return [{key: value for key, value in row.items() if key not in _MOVED} for row in rows]
