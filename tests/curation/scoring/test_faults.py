"""A hundred and twenty files, of which 23 are bad in all ways that files are bad: exactly those are given up."""

import json
from pathlib import Path

import numpy as np
import pytest

from kangaroo_jax.curation.engine import run as engine
from kangaroo_jax.curation.engine.manifest import read_inputs
from kangaroo_jax.curation.engine.run_shard import ShardPlan
from kangaroo_jax.curation.engine.shards import all_scores, make_shards
from kangaroo_jax.curation.select import judge
from kangaroo_jax.curation.stages import BY_NAME
from tests.curation.scoring.clips import breaking_job, moving, write_clip
from tests.data.media import write_audio

pytestmark = pytest.mark.slow


def write_bad(folder: Path) -> list[str]:
    """Twenty files that are no whole videos; their names."""
    rng = np.random.default_rng(0)
    whole = write_clip(folder / "good.mp4", moving(0, 60), g="10").read_bytes()
    begin = whole.index(b"mdat") + 4  # of the packets; the index comes after them
    end = whole.rindex(b"moov") - 4

    def noisy(count: int) -> bytes:
        data = bytearray(whole)
        for place in rng.integers(begin, end, count):
            data[place] ^= int(rng.integers(1, 256))
        return bytes(data)

    index = whole[:end] + whole[end : end + 8] + rng.bytes(len(whole) - end - 8)
    made = {"empty": b"", "html": b"<html>gone</html>", "noise": rng.bytes(20_000), "head": whole[:500]}
    made |= {f"cut_{percent}": whole[: len(whole) * percent // 100] for percent in (20, 40, 60, 80, 90, 95)}
    made |= {f"flipped_{count}": noisy(count) for count in (400, 800, 1600)}
    made |= {"zeroed": whole[:begin] + bytes(end - begin) + whole[end:], "index_lost": index, "end": whole[end:]}
    made |= {"reversed": whole[:begin] + whole[begin:end][::-1] + whole[end:]}
    made |= {"picture": b"\x89PNG\r\n\x1a\n" + rng.bytes(500), "archive": b"PK\x03\x04" + rng.bytes(3000)}
    for name, data in made.items():
        (folder / f"{name}.mp4").write_bytes(data)
    write_audio(folder / "sound.mp4")
    (folder / "good.mp4").unlink()
    return sorted(path.stem for path in folder.iterdir())


def test_exactly_the_bad_ones_are_given_up(tmp_path, config):
    folder = tmp_path / "media"
    folder.mkdir()
    bad = write_bad(folder)
    assert len(bad) == 20
    for n, name in enumerate(["segv_0", "hang_0", "eats_0", *(f"fine_{n}" for n in range(97))]):
        write_clip(folder / f"{name}.mp4", moving(n, 12))
    config.engine.update(item_seconds=15.0, memory_mib=1000)
    config.select.update(min_seconds=1.0, duplicates=False)
    plain = json.loads(json.dumps(config.to_dict()))
    stages = tuple(BY_NAME[name] for name in ("probe", "cuts", "keyframes", "motion", "fingerprint"))
    plan = ShardPlan(tmp_path / "out", stages, plain, job=breaking_job)
    engine.run_local(make_shards(read_inputs([str(folder)]), 64), plan, workers=2)
    rows = list(all_scores(plan.root))
    assert len(rows) == len({row["id"] for row in rows}) == 120
    verdicts = judge(rows, plain["select"])
    dropped = {Path(row["path"]).stem: verdict for row, verdict in zip(rows, verdicts, strict=True) if verdict}
    assert sorted(dropped) == sorted([*bad, "segv_0", "hang_0", "eats_0"])
    assert {rule for rule, _ in dropped.values()} == {"broken"}
    memory = [json.loads(file.read_bytes())["memory_mib"] for file in (plan.root / "timings").rglob("*.json")]
    assert max(memory) < 400
