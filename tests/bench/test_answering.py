"""`kangaroo bench chat` without --vs measures every part of an answer about a video."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from kangaroo_jax.bench import answering
from kangaroo_jax.cli import main as cli
from kangaroo_jax.config import StageConfig, stage_config
from kangaroo_jax.inference import weights
from kangaroo_jax.models.quantized import FORMATS

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.mark.slow
def test_each_number_of_frames_has_a_row(folder: Path, capsys) -> None:
    words = ["--preset=tiny", "--frames=8,4", "--seconds=2", "--rounds=1", "--new=8", f"--folder={folder}", "--json"]
    assert cli.main(["bench", "chat", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["frames"] for row in found["rows"]] == [4, 8] and found["bandwidth_gib_s"] > 0
    for row in found["rows"]:
        assert all(row[name] > 0 for name in row), row
    first, second = found["rows"]
    assert first["prompt_tokens"] < second["prompt_tokens"] and len(answering.table(found).splitlines()) == 4


@pytest.mark.parametrize("form", [None, *FORMATS])
def test_random_weights_are_those_of_a_loaded_model(form) -> None:
    config = StageConfig.from_config(stage_config("tiny")).model
    made, wanted = answering.random_weights(config, form), weights.abstract(config, form)
    for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(wanted), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
    assert 0 < answering.read_bytes(made) < sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(made))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--frames=8,x"], "--frames=8,x: must be numbers"),
        (["--frames=0"], "--frames=0: must be numbers"),
        (["--quantize=int3"], "--quantize=int3: use one of int8, int4"),
        (["--kv-dtype=int4"], "kv_dtype 'int4'"),
        (["--preset=tiny", "--frames=5"], "--frames=5: must be a multiple of 2"),
        (["--preset=none"], "unknown preset 'none'"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], says: str, folder: Path, capsys) -> None:
    assert cli.main(["bench", "chat", f"--folder={folder}", *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert says in said and "\n" not in said
