"""Training for real: it learns, it restarts bit for bit after kill -9, it says what is wrong in one line."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.config import ModelConfig, StageConfig
from kangaroo_jax.config_files import load_config
from kangaroo_jax.conventions import PackedBatch
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.parameters import abstract_model
from kangaroo_jax.sharding import make_mesh
from kangaroo_jax.training import curriculum, loop
from kangaroo_jax.training.initial import initial_state
from kangaroo_jax.training.loop import train
from kangaroo_jax.training.metrics import read_metrics, read_samples
from kangaroo_jax.training.optimizer import make_optimizer, make_schedule
from kangaroo_jax.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("one_device")

STEPS = 7  # a program has the length of its schedule in it: tests that agree on it find it compiled


def small_stage(name: str, corpus: Path, steps: int = STEPS, **kwargs):
    config = curriculum.stage(
        name, "tiny", data=corpus, tokenizer=corpus / "tokenizer.model", init_from=kwargs.pop("init_from", "")
    )
    config.data.update(packs_per_batch=1, tokens_per_pack=256, frames_per_pack=16, packing_bins=2)
    config.train.update(steps=steps, checkpoint_every=3, log_every=2, mesh=(1, 1, 1, 1))
    config.model.vision.depth = config.model.llm.depth = 1
    for key, value in kwargs.items():
        config.update_from_flattened_dict({key: value})
    return config


def test_stage_learns_and_leaves_its_records(corpus, tmp_path):
    config = small_stage("stage4_instruct", corpus, 30, **{"train.mesh": (), "train.accumulate": 0})  # by the chip
    lines: list[str] = []
    result = train(config, tmp_path, tell=lines.append)
    log = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in log] == list(range(1, 31))
    assert np.mean([line["loss"] for line in log[-5:]]) < 0.7 * log[0]["loss"]
    assert 0 < result.useful_token_share <= 1
    for name in ("config.json", "first_batch.txt", "first_batch.png", "tokenizer.model"):
        assert (tmp_path / name).stat().st_size > 0, name
    (machine,) = map(json.loads, (tmp_path / "machine.jsonl").read_text().splitlines())
    assert machine["after_step"] == 0 and machine["packages"]["jax"] == jax.__version__
    assert any("tok/s" in line and "ETA" in line for line in lines)
    assert reading.load_config(tmp_path).to_dict() == config.to_dict()
    assert reading.find_tokenizer(reading.find(tmp_path)) == tmp_path / "tokenizer.model"


def test_frozen_parts_stay_bit_for_bit_in_bf16_without_optimiser_state(corpus, tmp_path):
    config = small_stage("stage1_image_pretrain", corpus, 3)
    config.optimizer.trainable = load_config("stage1_image_pretrain:kangaroo_8b").optimizer.trainable
    binding = abstract_model(ModelConfig.from_config(config.model))
    before = initial_state(StageConfig.from_config(config), binding, make_mesh((1, 1, 1, 1), jax.devices()[:1]))
    assert all(v.dtype == jnp.bfloat16 for v in before.frozen.values())
    assert all(v.dtype == jnp.float32 for v in before.params.values())
    assert {k.split("/")[0] for k in before.params} == {"vision", "projector", "special_embedding"}
    trained_names = {str(path) for path, _ in jax.tree_util.tree_flatten_with_path(before.opt_state)[0]}
    assert not any("llm/" in name for name in trained_names)
    frozen = {k: np.asarray(v) for k, v in before.frozen.items()}
    params = {k: np.asarray(v) for k, v in before.params.items()}
    train(config, tmp_path, tell=lambda _: None)
    after = reading.load_params(tmp_path, binding)
    for name, value in frozen.items():
        np.testing.assert_array_equal(np.asarray(after[name]), value, err_msg=name)
    moved = [name for name, value in params.items() if not np.array_equal(np.asarray(after[name]), value)]
    assert "special_embedding" in moved and any(name.startswith("projector") for name in moved)


def test_gradients_of_frozen_parts_are_not_computed(corpus):
    """The jitted step has no output, and so no work, for a frozen weight's gradient: count its matmuls."""
    rows = {"data.tokens_per_pack": 64, "data.long_max_frames": 16, "data.long_min_frames": 16}
    flops = []
    for name in ("stage4_instruct", "stage5_long_video"):  # everything, and with a frozen decoder
        config = StageConfig.from_config(small_stage(name, corpus, 3, **rows))
        binding = abstract_model(config.model)
        state = initial_state(config, binding, make_mesh((1, 1, 1, 1), jax.devices()[:1]))
        optimizer = make_optimizer(config.optimizer, 3, state.params)
        step = make_train_step(binding, optimizer, make_schedule(config.optimizer, 3))
        flops.append(step.lower(state, empty_batch(config)).cost_analysis()["flops"])
    assert flops[1] < 0.6 * flops[0]


def empty_batch(config):
    b, t, f, s = 1, config.data.tokens_per_pack, config.data.frames_per_pack, config.data.image_size
    ints = jnp.zeros((b, t), jnp.int32)
    return PackedBatch(
        tokens=ints,
        segment_ids=ints,
        positions=ints,
        targets=ints,
        weights=jnp.zeros((b, t), jnp.float32),
        frames=jnp.zeros((b, f, s, s, 3), jnp.uint8),
        frame_times=jnp.zeros((b, f), jnp.float32),
        frame_groups=jnp.zeros((b, f), jnp.int32),
        vision_index=ints - 1,
    )


KILLS = int(os.environ.get("KANGAROO_TEST_TRAIN_KILLS", "3"))  # of a curriculum, spread over its stages
KILLED_STAGES = ("stage1_image_pretrain", "stage3_refine", "stage5_long_video")
KILLED_STEPS = 6 * (1 + -(-KILLS // 3)) + 2  # two checkpoints for each kill and two more, and the end between them

RUN = """
    import os, sys
    os.environ["XLA_FLAGS"] = ""
    import jax
    jax.config.update("jax_platforms", "cpu")
    from pathlib import Path
    from kangaroo_jax.training import curriculum
    corpus, workdir, steps, stages = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]

    def adjust(name, config):
        config.data.update(packs_per_batch=1, tokens_per_pack=256, frames_per_pack=16, packing_bins=2)
        config.data.update(long_max_frames=16, long_min_frames=16)
        config.train.update(steps=steps, checkpoint_every=3, log_every=1)
        config.model.vision.depth = config.model.llm.depth = 1

    curriculum.run("tiny", workdir, data=corpus, tokenizer=corpus / "tokenizer.model", adjust=adjust,
                   stages=stages, tell=lambda line: print(line, flush=True))
"""


def start_curriculum(corpus: Path, workdir: Path) -> subprocess.Popen:
    """Its output goes to WORKDIR.log."""
    command = [sys.executable, "-c", textwrap.dedent(RUN), str(corpus), str(workdir), str(KILLED_STEPS), *KILLED_STAGES]
    with open(f"{workdir}.log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "XLA_FLAGS": ""})


def whole_checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints of a stage that are whole."""
    return sorted(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit())


def wait_for_a_new_checkpoint(process: subprocess.Popen, workdir: Path, stage: str) -> int:
    """Until a stage has a whole checkpoint that it did not have, before its last; its step."""
    before, end = whole_checkpoints(workdir / stage), time.time() + 600
    while process.poll() is None and time.time() < end:
        new = whole_checkpoints(workdir / stage)
        if new and new[-1] > max(before, default=0):
            assert new[-1] < KILLED_STEPS, "the stage has ended: nothing to go on with"
            return new[-1]
        time.sleep(0.005)
    raise AssertionError(f"{stage} has no new checkpoint: {Path(f'{workdir}.log').read_text()[-2000:]}")


@pytest.mark.slow
def test_kill_9_after_a_checkpoint_changes_no_loss_no_gradient_and_no_sample(corpus, tmp_path):
    """Every kill comes after a whole checkpoint, in each stage in turn, and the next process goes on from it."""
    straight, workdir = tmp_path / "straight", tmp_path / "killed"
    assert start_curriculum(corpus, straight).wait(timeout=600) == 0, Path(f"{straight}.log").read_text()[-3000:]
    random, wanted = np.random.default_rng(0), ("", 0)
    for kill in range(KILLS + 1):
        process = start_curriculum(corpus, workdir)
        if kill < KILLS:
            stage = KILLED_STAGES[kill * len(KILLED_STAGES) // KILLS]
            wait_for_a_new_checkpoint(process, workdir, stage)
            time.sleep(float(random.uniform(0, 0.1)))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        else:
            assert process.wait(timeout=600) == 0
        output = Path(f"{workdir}.log").read_text()
        if wanted[1]:
            gone_on = re.search(f"^{wanted[0]}: goes on after step (\\d+)$", output, re.MULTILINE)
            assert gone_on and int(gone_on[1]) == wanted[1], (kill, wanted, output[-3000:])
            print(f"kill {kill}: {wanted[0]} went on after step {wanted[1]}")
        if kill < KILLS:
            wanted = stage, whole_checkpoints(workdir / stage)[-1]
            assert 0 < wanted[1] < KILLED_STEPS
    for stage in KILLED_STAGES:
        want = read_metrics(straight / stage / "metrics.jsonl")
        have = read_metrics(workdir / stage / "metrics.jsonl")
        assert [line["step"] for line in have] == list(range(1, KILLED_STEPS + 1))
        for a, b in zip(want, have, strict=True):
            for key in ("loss", "grad_norm", "learning_rate", "samples", "tokens", "frames"):
                assert a[key] == b[key], (stage, a["step"], key)
        assert read_samples(straight / stage / "samples.jsonl") == read_samples(workdir / stage / "samples.jsonl")


def test_missing_checkpoint_and_checkpoint_of_another_model_are_one_line(corpus, tmp_path):
    with pytest.raises(UserError, match="no such checkpoint folder"):
        train(small_stage("stage4_instruct", corpus, init_from=str(tmp_path / "none")), tmp_path / "a", tell=print)
    train(small_stage("stage4_instruct", corpus), tmp_path / "small", tell=lambda _: None)
    wider = small_stage("stage5_long_video", corpus, init_from=str(tmp_path / "small"))
    wider.model.llm.mlp_width = 256
    with pytest.raises(UserError, match=r"tensor llm/\S*mlp\S* has shape .* the config wants") as error:
        train(wider, tmp_path / "b", tell=lambda _: None)
    assert "\n" not in str(error.value)
    # Rope settings, which no shape shows: the first that differs is named.
    faster = small_stage("stage5_long_video", corpus, init_from=str(tmp_path / "small"))
    faster.model.llm.rope_scaling.low_freq_factor = 2.0  # means nothing where the factor is 1
    reading.check_rope(tmp_path / "small", ModelConfig.from_config(faster.model))
    for name, value in (("llm.rope_scaling", 8.0), ("llm.rope_theta", 5e5), ("vision.rope_reference_grid", 16)):
        key = f"{name}.factor" if "scaling" in name else name  # each comes before the last in order
        faster.update_from_flattened_dict({f"model.{key}": value})
        with pytest.raises(UserError, match=f"small.*: config.model.{name} of the checkpoint is") as error:
            reading.check_rope(tmp_path / "small", ModelConfig.from_config(faster.model))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="rope_reference_grid of the checkpoint is 4, of this config 16"):
        train(faster, tmp_path / "b", tell=lambda _: None)
    faster.init_other_rope = True  # on purpose
    begun = loop.prepare(StageConfig.from_config(faster), tmp_path / "b", lambda _: None)
    assert begun.records.first == 0
    begun.loader.close()
    begun.checkpoints.close()


def test_wrong_tokenizer_and_missing_data_are_one_line(corpus, tmp_path):
    config = small_stage("stage4_instruct", corpus, 2)
    config.model.special_ids.eof = 100
    with pytest.raises(UserError, match=r"<eof> is 7, but config.model.special_ids.eof is 100"):
        train(config, tmp_path, tell=print)
    with pytest.raises(UserError, match=r"this is tiny: say :base_100m or :tiny after the config's name"):
        train(config, tmp_path, tell=print)
    with pytest.raises(UserError, match=r"stage2.jsonl: no such file"):
        curriculum.stage("stage2_video_pretrain", "tiny", data=tmp_path, tokenizer="x", init_from="")
    with pytest.raises(UserError, match="learning_rat"):
        curriculum.stage(
            "stage4_instruct", "tiny", data=corpus, tokenizer="x", init_from="", overrides={"optimizer.learning_rat": 1}
        )


def test_metrics_file_survives_a_cut_line(tmp_path):
    from kangaroo_jax.training.metrics import MetricLog

    log = MetricLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    log = MetricLog(tmp_path)
    log.rewind(2)
    log.write(3, {"loss": 9.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[-1]["loss"] == 9.0
