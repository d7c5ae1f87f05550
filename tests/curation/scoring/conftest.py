"""A small folder of clips, and the config with little in it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from kangaroo_jax.config_files import load_config
from tests.curation.scoring.clips import moving, write_clip


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips that differ, of 2.5 seconds."""
    folder = tmp_path_factory.mktemp("clips")
    for seed in range(6):
        write_clip(folder / f"clip_{seed}.mp4", moving(seed))
    return folder


@pytest.fixture
def config() -> ConfigDict:
    """The config without the stages that need models."""
    config = load_config("curation").unlock()
    for stage in ("text", "face", "caption_language"):
        config[stage].enabled = False
    config.engine.workers = 1
    return config


@pytest.fixture
def tree() -> Callable[[Path], dict[str, bytes]]:
    """All files of an output folder but for the seconds that it took, and the report that shows them."""

    def read(root: Path) -> dict[str, bytes]:
        files = (file for file in root.rglob("*") if file.is_file())
        names = {file.relative_to(root).as_posix(): file for file in files}
        return {name: file.read_bytes() for name, file in names.items() if not name.startswith(("timings/", "report"))}

    return read
