"""LoRA: the factors train and are kept, the base stays as it is, is never written again and is known by its digests."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from kangaroo_jax.checkpoints.adapters import kept_base, open_adapter
from kangaroo_jax.checkpoints.stored import Stored, whole
from kangaroo_jax.cli import main as cli
from kangaroo_jax.config import LoraConfig, ModelConfig, StageConfig
from kangaroo_jax.conventions import PackedBatch
from kangaroo_jax.conversion.convert import convert
from kangaroo_jax.conversion.lora import open_adapter as open_factors
from kangaroo_jax.conversion.runs import open_run
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.adapters import load_adapted
from kangaroo_jax.inference.chat import Kangaroo
from kangaroo_jax.models.layers import Linear
from kangaroo_jax.models.lora import initial_factors, is_factor
from kangaroo_jax.models.parameters import Binding, abstract_model
from kangaroo_jax.models.quantized import quantize_rows
from kangaroo_jax.sharding import make_mesh
from kangaroo_jax.training import finishing
from kangaroo_jax.training.base import adapter_state, load_base
from kangaroo_jax.training.check import check_config, check_trainable
from kangaroo_jax.training.loop import train
from kangaroo_jax.training.measuring import HeldOutLoss
from kangaroo_jax.training.metrics import read_metrics
from kangaroo_jax.training.state import abstract_state
from kangaroo_jax.training.step import mean_loss
from tests.training.test_loop import small_stage

pytestmark = pytest.mark.usefixtures("one_device")
STEPS, RANK = 6, 4


def quiet(_: str) -> None:
    """No progress."""


def save(folder: Path, params: dict, config, tokenizer: Path) -> Path:
    """A stage's folder with one checkpoint of all weights."""
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder / "checkpoints" / "7" / "params", params)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(folder / "checkpoints" / "7" / "config", args=ocp.args.JsonSave(config.to_dict()))
    shutil.copy(tokenizer, folder / "tokenizer.model")
    return folder


def adapter_stage(corpus: Path, base: Path, **kwargs):
    keys = {
        "optimizer.kind": "adamw",
        "optimizer.learning_rate": 0.02,
        "optimizer.frozen_dtype": "float32",
        "optimizer.trainable": ((".*", 1.0),),
        "lora.rank": RANK,
        "train.checkpoint_every": 3,
    }
    return small_stage("stage4_instruct", corpus, STEPS, **{"init_from": str(base), **keys, **kwargs})


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory, make_random_model) -> Path:
    config = small_stage("stage4_instruct", corpus)
    model = make_random_model(config.model)
    params = abstract_model(ModelConfig.from_config(config.model)).flatten(model)
    return save(tmp_path_factory.mktemp("base"), params, config, corpus / "tokenizer.model")


@pytest.fixture(scope="module")
def run(corpus, base, tmp_path_factory, one_device) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(adapter_stage(corpus, base), folder, tell=quiet)
    return folder


def arrays(folder: Path) -> dict[str, np.ndarray]:
    stored = Stored(folder)
    return {name: stored.read(name, whole(spec.shape)) for name, spec in stored.specs.items()}


def test_a_full_rank_takes_the_full_gradients_step():
    """With a whole basis as A and zeros as B a step of B is a step of the kernel."""
    linear = Linear((6,), (2, 4), (None, None, None), bias=True, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    random = np.random.default_rng(0)
    x, y = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((5, 6), (5, 2, 4)))
    basis = np.linalg.qr(random.standard_normal((6, 6)))[0].astype(np.float32)

    def step(name: str) -> jax.Array:
        """One of plain descent by one parameter of the linear map."""
        binding = Binding(linear)
        params = binding.flatten(linear)

        def loss(value: jax.Array) -> jax.Array:
            return jnp.square(binding.bind({**params, name: value})(x) - y).mean()

        return -0.1 * jax.grad(loss)(params[name])

    expected = step("kernel")
    linear.lora_a, linear.lora_b = nnx.Param(jnp.asarray(basis)), nnx.Param(jnp.zeros((6, 2, 4)))
    np.testing.assert_allclose(np.tensordot(basis, step("lora_b"), 1), expected, atol=1e-5 * np.abs(expected).max())


@pytest.fixture(scope="module")
def batch() -> PackedBatch:
    """A pack of two pairs of frames and text."""
    random, t = np.random.default_rng(0), 32
    tokens = random.integers(11, 320, (1, t)).astype(np.int32)
    index = np.full((1, t), -1, np.int32)
    index[0, 3:11] = np.arange(8)
    return PackedBatch(
        tokens=tokens,
        segment_ids=np.ones((1, t), np.int32),
        positions=np.arange(t, dtype=np.int32)[None],
        targets=np.roll(tokens, -1, axis=1),
        weights=np.ones((1, t), np.float32),
        frames=random.integers(0, 256, (1, 4, 32, 32, 3)).astype(np.uint8),
        frame_times=np.arange(4, dtype=np.float32)[None],
        frame_groups=np.array([[1, 1, 2, 2]], np.int32),
        vision_index=index,
    )


@pytest.mark.parametrize("form", ["", "int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_the_first_loss_is_the_bases(form, corpus, base, batch, one_device):
    stage = StageConfig.from_config(adapter_stage(corpus, base, **{"lora.quantize": form}))
    mesh = make_mesh((1, 1, 1, 1), jax.devices())
    binding = abstract_model(stage.model, stage.lora)
    frozen, found = load_base(stage, binding, mesh, None)
    state = adapter_state(stage, abstract_state(stage, binding, mesh), frozen)
    assert set(state.params) == {p for p in binding.shapes if p.endswith(("lora_a", "lora_b"))} and not set(
        state.params
    ) & set(state.frozen)
    plain = abstract_model(stage.model)
    stored = arrays(base / "checkpoints/7/params")
    whole_model = {path: jnp.asarray(value) for path, value in stored.items()}
    expected, got = (
        float(jax.jit(functools.partial(mean_loss, model, batch=batch))(trained, frozen)[0])
        for model, trained, frozen in ((plain, whole_model, {}), (binding, state.params, state.frozen))
    )
    if form:
        assert got == pytest.approx(expected, rel={"int8": 0.02, "int4": 0.3}[form]) and got != expected
        assert state.frozen["llm/layers/mlp/up/kernel"].dtype == {"int8": jnp.int8, "int4": jnp.uint8}[form]
    else:
        assert got == expected
    assert found.path == base / "checkpoints/7" and set(found.sums) == set(stored)


def test_a_run_keeps_its_factors_alone_and_leaves_the_base(run, base, corpus):
    steps = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert steps == ["3", str(STEPS)]
    folder = run / "checkpoints" / str(STEPS)
    assert not (folder / "frozen").exists()
    kept = arrays(folder / "params")
    stage = StageConfig.from_config(adapter_stage(corpus, base))
    begun = initial_factors(abstract_model(stage.model, stage.lora).shapes, stage.seed)
    assert set(kept) == set(begun) and all(np.abs(kept[name] - begun[name]).max() > 0 for name in kept)
    named = kept_base(folder)
    assert named.path == base / "checkpoints/7"
    assert named.sums == load_adapted(base).sums  # what is there now
    losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
    assert np.mean(losses[-2:]) < losses[0]
    adapter = open_adapter(run)
    assert (adapter.rank, adapter.scale) == (RANK, 32 / RANK)


def test_a_run_that_goes_on_has_the_same_losses_bit_for_bit(run, base, corpus, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    train(adapter_stage(corpus, base), tmp_path / "run", tell=quiet)
    before, after = (
        [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(folder / "metrics.jsonl")]
        for folder in (run, tmp_path / "run")
    )
    assert before == after
    step = f"checkpoints/{STEPS}/params"
    for name, value in arrays(run / step).items():
        np.testing.assert_array_equal(arrays(tmp_path / "run" / step)[name], value)


@pytest.mark.slow
def test_kill_9_changes_no_loss(run, base, corpus, tmp_path):
    program = (
        "import sys, ml_collections, json; from kangaroo_jax.training.loop import train;"
        "from kangaroo_jax.config import tuples;"
        "train(ml_collections.ConfigDict(tuples(json.load(open(sys.argv[1])))), sys.argv[2])"
    )
    (tmp_path / "stage.json").write_text(json.dumps(adapter_stage(corpus, base).to_dict()))
    workdir = tmp_path / "run"
    command = [sys.executable, "-c", program, str(tmp_path / "stage.json"), str(workdir)]
    environment = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")}
    process = subprocess.Popen(command, env=environment)
    while not (workdir / "checkpoints" / "3" / "base").is_dir() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command, env=environment, check=True)
    before, after = (
        [(line["step"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl")] for folder in (run, workdir)
    )
    assert before == after


@pytest.mark.parametrize("form", ["", pytest.param("int8", marks=pytest.mark.slow)])
def test_unmerged_and_merged_answers_are_equal(form, run, base, corpus, tmp_path):
    if form:
        train(adapter_stage(corpus, base, **{"lora.quantize": form}), tmp_path / "run", tell=quiet)
        run = tmp_path / "run"
    convert([run], tmp_path / "merged", format="orbax", tell=quiet)
    questions = [{"video": str(path), "query": f"{path.stem}?"} for path in sorted(corpus.glob("*s.mp4"))]
    answers = []
    for folder, lora in ((run, ""), (base, run), (tmp_path / "merged", "")):
        with Kangaroo.load(folder, lora=lora) as model:
            answers.append([str(model.chat(**question, max_new_tokens=8)[0]) for question in questions])
    with Kangaroo.load(base) as model:
        plain = [str(model.chat(**question, max_new_tokens=8)[0]) for question in questions]
    assert answers[0] == answers[1] == answers[2] != plain


def test_two_adapters_share_the_arrays_of_their_base(run, base):
    from kangaroo_jax.inference.adapters import adapted
    from kangaroo_jax.inference.weights import load

    plain = load(base)
    one, two = (adapted(plain, open_adapter(run)) for _ in range(2))
    kernels = {loaded.model.llm.layers[0].mlp.up.kernel[...].unsafe_buffer_pointer() for loaded in (plain, one, two)}
    assert len(kernels) == 1 and plain.model.llm.layers[0].mlp.up.lora_a is None
    assert one.weights_id == two.weights_id != plain.weights_id


def test_a_base_that_is_gone_or_another_is_one_line(run, base, corpus, tmp_path, make_random_model):
    moved = tmp_path / "base"
    shutil.copytree(base, moved)
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / str(STEPS) / "base" / "metadata"
    kept = json.loads(file.read_text())
    kept["path"] = str(tmp_path / "gone" / "7")
    file.write_text(json.dumps(kept))
    with pytest.raises(UserError, match=r"its base, .*gone/7, is gone; copy it back there, or say where it is now"):
        load_adapted(tmp_path / "run")
    assert load_adapted(moved, tmp_path / "run").sums == load_adapted(base).sums
    convert([tmp_path / "run"], tmp_path / "merged", base=moved, tell=quiet)

    step = moved / "checkpoints" / "7" / "params"
    params = arrays(step)
    params["llm/layers/mlp/up/kernel"][0, 0, 0] += 1
    shutil.rmtree(step)
    with ocp.StandardCheckpointer() as writer:
        writer.save(step, {name: jnp.asarray(value) for name, value in params.items()})
    stage = adapter_stage(corpus, moved)
    reads = (
        lambda: load_adapted(moved, tmp_path / "run"),
        lambda: convert([tmp_path / "run"], tmp_path / "again", base=moved, tell=quiet),
        lambda: train(stage, tmp_path / "run", tell=quiet),
    )
    for read in reads:
        with pytest.raises(UserError, match=r"is another base .*first tensor llm/layers/mlp/up/kernel") as error:
            read()
        assert "\n" not in str(error.value)


def test_an_adapter_is_no_base(run, base, corpus, tmp_path):
    for read in (
        lambda: train(adapter_stage(corpus, run), tmp_path, tell=quiet),
        lambda: train(adapter_stage(corpus, run, **{"lora.rank": 0}), tmp_path, tell=quiet),
        lambda: load_adapted(run, run),
    ):
        with pytest.raises(UserError, match="is itself an adapter, and holds no whole model; add it to its base first"):
            read()
    with pytest.raises(UserError, match="holds a whole model, no adapter"):
        load_adapted(base, base)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora.rank": 65}, "config.lora.rank is 65, above the width of llm/layers/attention/key, 64"),
        ({"lora.rank": -1}, "config.lora.rank is -1: must be at least 0"),
        ({"lora.targets": "llm/head"}, "config.lora.targets 'llm/head' matches no linear map; there are llm/layers/"),
        ({"lora.targets": "("}, r"config.lora.targets '\(' is no regular expression"),
        ({"lora.alpha": 0.0}, "config.lora.alpha is 0.0: must be above 0"),
        ({"lora.quantize": "int3"}, "config.lora.quantize is 'int3': one of , int8, int4"),
        ({"lora.rank": 0, "lora.quantize": "int8"}, "config.lora.quantize is 'int8': needs config.lora.rank"),
        ({"init_from": ""}, "config.lora.rank is 4: needs config.init_from"),
        ({"optimizer.trainable": (("llm/.*", None), (".*", 1.0))}, "freezes llm/layers/.*, which config.lora.targets"),
    ],
)
def test_impossible_settings_are_one_line(keys, message, base, corpus):
    with pytest.raises(UserError, match=message):
        stage = StageConfig.from_config(adapter_stage(corpus, base, **keys))
        check_config(stage)
        check_trainable(stage, abstract_model(stage.model, stage.lora).shapes)


def test_settings_of_an_adapter_stay_within_a_run(run, base, corpus, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for key, value in {"lora.rank": 2, "lora.alpha": 8.0, "lora.targets": "llm/.*", "lora.quantize": "int8"}.items():
        with pytest.raises(UserError, match=f"config.{key} was .*cannot change within a stage"):
            train(adapter_stage(corpus, base, **{key: value}), tmp_path / "run", tell=quiet)


def nbytes(lora: LoraConfig, factors: bool = False) -> int:
    """Of 8B beside the factors in bfloat16, or of these as a finished run keeps them."""
    shapes = {path: x for path, x in abstract_model(ModelConfig(), lora).shapes.items() if is_factor(path) == factors}
    sizes = {path: 4 if path.endswith("_scale") else min(2, x.dtype.itemsize) for path, x in shapes.items()}
    return sum(int(np.prod(x.shape)) * sizes[path] for path, x in shapes.items())


def test_an_int8_base_and_a_finished_adapter_are_small_at_8b():
    plain = LoraConfig(rank=16)
    assert nbytes(LoraConfig(rank=16, quantize="int8")) / nbytes(plain) < 0.54
    assert nbytes(plain, factors=True) < min(0.01 * nbytes(plain), 95e6)


def test_an_embedding_in_int8_is_off_by_half_a_step_of_its_row():
    table = np.random.default_rng(0).normal(size=(50, 24)).astype(np.float32) * np.arange(50)[:, None]
    whole_numbers, scale = quantize_rows(table)
    np.testing.assert_allclose(scale[1:], np.abs(table).max(axis=1)[1:] / 127, rtol=1e-6)
    assert (np.abs(whole_numbers * scale[:, None] - table) <= 0.5001 * scale[:, None]).all() and scale[0] == 1


def finished(folder: Path, corpus: Path, base: Path, **kwargs) -> Path:
    """A run that measured itself, whose best checkpoint is not its last, and that keeps no state."""
    held_out = {"eval.every": 3, "eval.held_out": (str(corpus / "held.jsonl"),), "lora.keep_state": False}
    train(adapter_stage(corpus, base, **held_out, **kwargs), folder, tell=quiet)
    return folder


def test_a_finished_run_keeps_its_best_factors_alone(corpus, base, tmp_path, monkeypatch):
    lines = (corpus / "stage4.jsonl").read_text().splitlines(keepends=True)
    (corpus / "held.jsonl").write_text("".join(lines[:2]))
    losses = iter((1.0, 2.0))
    monkeypatch.setattr(HeldOutLoss, "of", lambda self, state: next(losses))
    kept = {}
    link = finishing.link_best

    def look(workdir: Path, target: str) -> None:
        kept.update({item: arrays(workdir / "checkpoints/3" / item) for item in ("params", "ema")})
        kept["answers"] = answers(workdir / "checkpoints/3")
        link(workdir, target)

    def answers(folder: Path) -> list[str]:
        with Kangaroo.load(folder) as model:
            return [str(model.chat(video=str(path), query="?", max_new_tokens=8)[0]) for path in corpus.glob("*s.mp4")]

    with monkeypatch.context() as patch:
        patch.setattr(finishing, "link_best", look)
        run = finished(tmp_path / "run", corpus, base, **{"optimizer.ema": 0.5})
    assert not (run / "checkpoints").exists() and sorted(p.name for p in (run / "adapter").iterdir() if p.is_dir()) == [
        "base",
        "config",
        "digests",
        "ema",
        "params",
    ]
    for item in ("params", "ema"):
        factors = arrays(run / "adapter" / item)
        assert factors.keys() == kept[item].keys()
        for name, value in factors.items():
            np.testing.assert_array_equal(value, kept[item][name])
    check_average(run, kept["params"], kept["ema"])
    assert answers(run) == kept["answers"]
    told: list[str] = []
    stage = adapter_stage(corpus, base, **{"lora.keep_state": False, "optimizer.ema": 0.5})
    stage.optimizer.learning_rate = 0.5
    assert train(stage, run, tell=told.append).steps == STEPS
    assert "finetune" not in told[-1] and told[-1].endswith(
        "is finished after step 6, and stays as it was trained: other settings need another workdir"
    )
    assert any("config.optimizer.learning_rate was 0.02, is now 0.5" in line for line in told)
    stage.train.steps = STEPS + 1
    with pytest.raises(UserError, match="is finished after 6 steps and keeps its factors alone: .* in another workdir"):
        train(stage, run, tell=quiet)


def check_average(run: Path, last: dict[str, np.ndarray], average: dict[str, np.ndarray]) -> None:
    """Every reader takes the average of the factors where it is asked to, and the factors where it is not."""
    kernel, (a, b) = "llm/layers/mlp/up/kernel", ("llm/layers/mlp/up/lora_a", "llm/layers/mlp/up/lora_b")
    assert np.abs(last[b] - average[b]).max() > 0
    for ema, factors in ((False, last), (True, average)):
        found = load_adapted(run, ema=ema).model.llm.layers[0].mlp.up.lora_b[...]
        np.testing.assert_array_equal(found, factors[b][0])
        alone = open_factors(run, None, ema).weights
        np.testing.assert_array_equal(alone.read(b, whole(alone.specs[b].shape)), factors[b])
        merged = open_run(run, None, ema).weights
        added = merged.read(kernel, whole(merged.specs[kernel].shape))[0] - merged_base(run, kernel)
        np.testing.assert_allclose(added, 32 / RANK * factors[a][0] @ factors[b][0], atol=1e-5)


def merged_base(run: Path, kernel: str) -> np.ndarray:
    """A kernel of the first layer of a run's base."""
    return arrays(kept_base(run / "adapter").path / "params")[kernel][0]


@pytest.mark.parametrize(
    "words",
    [
        ("chat", "--query=?"),
        ("serve",),
        ("convert", "--to=x"),
        ("eval", "--benchmark=x.jsonl", "--data=.", "--workdir=x"),
    ],
)
def test_a_checkpoint_without_an_average_is_one_line(words, base, tmp_path, monkeypatch, capsys):
    if words[0] == "serve":
        pytest.importorskip("fastapi"), pytest.importorskip("uvicorn"), pytest.importorskip("prometheus_client")
    monkeypatch.chdir(tmp_path)
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": "a", "conversations": turns, "answer": "a"}) + "\n")
    which = "--from" if words[0] == "convert" else "--checkpoint"
    assert cli.main([words[0], f"{which}={base}", "--ema", *words[1:]]) == 2
    error = capsys.readouterr().err
    assert "holds no average of its weights; train with --config.optimizer.ema" in error and error.count("\n") == 1


def test_a_run_that_is_killed_while_it_finishes_goes_on(run, base, corpus, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    stage = adapter_stage(corpus, base, **{"lora.keep_state": False})
    with monkeypatch.context() as patch:
        patch.setattr(finishing, "link_best", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(stage, tmp_path / "run", tell=quiet)
    assert (tmp_path / "run/checkpoints").exists()
    train(stage, tmp_path / "run", tell=quiet)
    assert not (tmp_path / "run/checkpoints").exists() and open_adapter(tmp_path / "run").rank == RANK
