"""How full rows get: made-up lengths, packing offline, and the stages' own rows."""

import json

import numpy as np
import pytest

from kangaroo_jax.bench.packing import bench_packing, made_up
from kangaroo_jax.cli import main as cli
from kangaroo_jax.config import StageConfig
from kangaroo_jax.data.audit.stats import Sizes, fullness, offline_rows

TARGETS = {"stage4_instruct": 0.97, "stage5_long_video": 0.96}  # useful tokens; of frames 0.92


def test_offline_packing_of_a_known_case():
    """6+4, 5+5 and 3 fill three rows of 10; first fit decreasing finds them; frames can need more rows than tokens."""
    needs = np.array([[3, 0], [4, 0], [5, 0], [5, 0], [6, 0]])
    for best in (False, True):
        assert offline_rows(needs, np.array([10, 1]), best=best) == 3
        assert offline_rows(needs + [0, 2], np.array([10, 2]), best=best) == 5
    # 7 and 6 begin a row each; the 4 fits beside the 6 alone, the 3 then beside the 7.
    assert offline_rows(np.array([[6, 0], [7, 0], [3, 0], [4, 0]]), np.array([10, 1]), best=True) == 2


def test_no_packing_exceeds_its_bound():
    rng = np.random.default_rng(0)
    samples = [Sizes(str(i), range(int(rng.integers(5, 60))), int(rng.integers(0, 9))) for i in range(400)]
    found = fullness(samples, 100, 16, 16)
    for kind in ("tokens", "frames"):
        assert found[f"offline_{kind}"] <= found[f"{kind}_at_most"] <= 1
        assert found[f"useful_{kind}"] <= found[f"{kind}_at_most"] + 0.01  # those that wait are not counted


@pytest.mark.parametrize("stage", TARGETS)
@pytest.mark.parametrize("text", ["uniform", "log-uniform"])
def test_rows_of_the_published_model_are_full(stage, text):
    config = StageConfig.load(f"{stage}:kangaroo_8b")
    assert max(len(sample.tokens) for sample in made_up(config, 500, text)) <= config.data.max_sample_tokens
    found = bench_packing(config, 4000, text)
    assert found["useful_tokens"] >= TARGETS[stage] and found["useful_frames"] >= 0.92, found


def test_the_job_prints_a_table(capsys):
    command = ["bench", "packing", "--config", "stage4_instruct:kangaroo_8b", "--samples=200"]
    assert cli.main([*command, "--row=10240x64"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 4 and "| stage4 | 10,240 / 64 | uniform |" in out
    assert cli.main([*command, "--json"]) == 0
    assert {entry["row"] for entry in json.loads(capsys.readouterr().out)} == {"13,312 / 96"}
    assert cli.main(["bench", "packing", "--row=7"]) == 2 and "--row=7 must be" in capsys.readouterr().err
