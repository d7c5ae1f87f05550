"""Going on from a checkpoint: what may change, what may not, what is damaged, and who else is in the folder."""

import json
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.checkpoints.digests import changed, digests
from kangaroo_jax.checkpoints.reading import NotFinite
from kangaroo_jax.config import StageConfig
from kangaroo_jax.data.tokenizer import train_sentencepiece
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.parameters import abstract_model
from kangaroo_jax.training import loop
from kangaroo_jax.training.checkpoint import Checkpoints
from kangaroo_jax.training.loop import train
from kangaroo_jax.training.metrics import read_metrics, read_samples
from kangaroo_jax.training.resume import check_resume, check_tokenizer, same_tokens
from kangaroo_jax.training.step import TrainState
from kangaroo_jax.training.stopping import Preempted, Preemption, locked
from tests.training.test_loop import STEPS, small_stage

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory, one_device) -> Path:
    """A stage that a kill has cut off after step 4, with the checkpoints 2 and 4; data and tokenizer are its copies."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(corpus / "stage4.jsonl", folder / "data.jsonl")
    train(config_of(folder, corpus), folder / "run", tell=lambda _: None)
    for step in range(5, STEPS + 1):
        shutil.rmtree(folder / "run" / "checkpoints" / str(step), ignore_errors=True)
    return folder


def config_of(folder: Path, corpus: Path, **changes):
    kept = {"train.checkpoint_every": 2, "train.keep_checkpoints": 4}
    config = small_stage("stage4_instruct", corpus, **{**kept, **changes})
    config.data.train, config.data.media_root = (str(folder / "data.jsonl"),), str(corpus)
    return config


def typed(folder: Path, corpus: Path, **changes) -> StageConfig:
    return StageConfig.from_config(config_of(folder, corpus, **changes))


REFUSED = {
    "optimizer.kind": ("adamw", "optimizer.kind was 'muon' and is now 'adamw'"),
    "optimizer.trainable": ((("llm/.*", None), (".*", 1.0)), r"config.optimizer.trainable was \(\('\.\*', 1.0\)"),
    "model.llm.mlp_width": (256, "model.llm.mlp_width was 192 and is now 256: it cannot change within a stage"),
    "model.llm.depth": (2, "model.llm.depth was 1 and is now 2"),
    "model.llm.rope_theta": (
        5e5,
        "model.llm.rope_theta was 10000.0 .*allow_changes='\\(\"model.llm.rope_theta\",\\)'",
    ),
    "model.tpe.enabled": (False, "model.tpe.enabled was True"),
    "model.llm.norm_eps": (1e-6, "model.llm.norm_eps was 1e-05"),
}


def test_what_cannot_change_is_named_and_what_may_is_said(trained, corpus):
    folder = reading.find(trained / "run")
    shapes = abstract_model(typed(trained, corpus).model).shapes
    assert check_resume(folder, typed(trained, corpus), shapes) == []
    for key, (value, message) in REFUSED.items():
        config = typed(trained, corpus, **{key: value})
        with pytest.raises(UserError, match=message) as error:
            check_resume(folder, config, abstract_model(config.model).shapes)
        assert "\n" not in str(error.value)
    may = {"optimizer.learning_rate": 3e-3, "data.fps": 2.0, "train.steps": 8}
    may["optimizer.trainable"] = (("llm/.*", 0.5), (".*", 1.0))  # the same weights train
    may["model.llm.rope_scaling.low_freq_factor"] = 2.0  # means nothing where the factor is 1
    config = typed(trained, corpus, **may)
    lines = "\n".join(check_resume(folder, config, shapes))
    said = ("learning_rate was 0.002, is now 0.003", "data.fps was 1.0, is now 2.0", f"steps was {STEPS}", "trainable")
    for part in said:
        assert part in lines
    assert "rope" not in lines
    config = config.changed({"model.tpe.enabled": False, "allow_changes": ("model.tpe.enabled",)})
    assert "config.model.tpe.enabled was True, is now False" in check_resume(folder, config, shapes)


def test_a_refused_resume_leaves_the_folder_and_an_edited_source_is_said(trained, corpus, tmp_path):
    shutil.copytree(trained, tmp_path / "t")
    folder, run = tmp_path / "t", tmp_path / "t" / "run"
    before = (run / "config.json").read_bytes()
    config = config_of(trained, corpus, **{"data.packs_per_batch": 2})
    with pytest.raises(UserError, match="config.data.packs_per_batch was 1 and is now 2;"):
        train(config, run, tell=lambda _: None)
    assert (run / "config.json").read_bytes() == before
    text = (folder / "data.jsonl").read_text()
    (folder / "data.jsonl").write_text(text.replace("yellow square", "violet square"))
    lines: list[str] = []
    gone = {"init_from": str(tmp_path / "deleted")}  # a stage that goes on needs it no more
    train(config_of(folder, corpus, **gone), run, tell=lines.append)
    said = "\n".join(lines)
    starts = [json.loads(line)["after_step"] for line in (run / "machine.jsonl").read_text().splitlines()]
    assert starts[-1] == 4 and len(starts) >= 2  # a refused start is none
    assert "data.jsonl was edited since the last checkpoint" in said and "goes on after step 4" in said
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [*range(1, STEPS + 1)]
    samples = read_samples(run / "samples.jsonl")
    assert sorted(samples) == [*range(1, STEPS + 1)] and all(samples.values())
    for line in read_metrics(run / "metrics.jsonl"):
        assert line["samples"] == len(samples[line["step"]]) and line["elapsed"] >= line["stepping"]


def test_another_tokenizer_is_refused_on_resume_and_as_a_start(trained, corpus, tmp_path):
    texts = ["a red square", "what time is it", "seconds and hours", "blue, green, yellow", "colour of the long video"]
    train_sentencepiece(texts * 3, tmp_path / "other.model", vocab_size=300)
    folder = reading.find(trained / "run")
    config = config_of(trained, corpus, **{"data.tokenizer": str(tmp_path / "other.model")})
    for changes in ({}, {"init_from": str(trained / "run")}):
        run = tmp_path / "new" if changes else trained / "run"
        config.update_from_flattened_dict(changes)
        with pytest.raises(UserError, match=r"other.model: is another tokenizer than .*allow_changes='\(\"data.tok"):
            train(config, run, tell=lambda _: None)
    allowed = StageConfig.from_config(config).changed({"allow_changes": ("data.tokenizer",)})
    assert "is another tokenizer" in check_tokenizer(folder, allowed, loop.open_tokenizer(allowed))
    reading.keep_tokenizer(config.data.tokenizer, tmp_path)
    assert reading.find_tokenizer(tmp_path).read_bytes() == (tmp_path / "other.model").read_bytes()


def test_a_stop_before_the_second_step_says_that_the_first_is_saved(trained, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(Preemption, "reached", lambda self, step: step == 2)
    lines: list[str] = []
    with pytest.raises(Preempted):
        train(config_of(trained, corpus), tmp_path, tell=lines.append)
    assert lines[-1] == "stage4_instruct: asked to stop; saved after step 1"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()] == ["1"]


def test_tokenizers_are_the_same_by_size_ends_names_and_text():
    def made(size=3, stop_ids=(1, 2), names="abc", texts="xyz", settings=None):
        texts_of = lambda ids: "".join(texts[i] for i in ids)  # noqa: E731
        options = dict(vocab_size=size, stop_ids=stop_ids, settings=settings)
        return types.SimpleNamespace(name=names.__getitem__, decode=texts_of, **options)

    assert same_tokens(made(), made())
    for other in ({"size": 2}, {"stop_ids": (1, 0)}, {"names": "abd"}, {"texts": "xyy"}, {"settings": "chatml"}):
        assert not same_tokens(made(), made(**other)) and not same_tokens(made(**other), made())


def test_a_second_run_in_the_folder_is_refused_until_the_first_ends(tmp_path):
    with locked(tmp_path, print):
        with pytest.raises(UserError, match="another run is in this folder .*process"), locked(tmp_path, print):
            pass
    with locked(tmp_path, print):
        pass


# ---------------------------------------------------------------------------------- damage


def small_state(step: int) -> TrainState:
    params = {"a": jnp.asarray(np.random.default_rng(step).standard_normal((64, 64)), jnp.float32)}
    return TrainState(
        jnp.int32(step), params, {"b": jnp.ones(8, jnp.bfloat16)}, {"mu": params, "count": jnp.int32(step)}
    )


def saved(folder: Path, steps=(2, 4), **options) -> Checkpoints:
    checkpoints = Checkpoints(folder, small_state(0), **options)
    for step in steps:
        checkpoints.save(small_state(step), b"x", {"a": 1})
    checkpoints.wait()
    return checkpoints


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def flip(newest: Path) -> None:
    """Store other numbers in place of those that were saved, as undetected as a flipped bit is."""
    other = newest.parent.parent / "other"
    saved(other, (4,)).close()
    state = small_state(4)
    state.params["a"] = state.params["a"].at[3, 5].add(1e-7)
    checkpoints = Checkpoints(other / "b", state)
    checkpoints.save(state, b"x", {"a": 1})
    checkpoints.close()
    shutil.rmtree(newest / "params")
    shutil.copytree(other / "b" / "checkpoints" / "4" / "params", newest / "params")


def cut(newest: Path) -> None:
    for path in files(newest / "optimizer"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


DAMAGE = {
    "a flipped bit": (flip, "params: 1 arrays are not as they were saved, first a"),
    "a cut item": (cut, ""),
    "a missing item": (lambda newest: shutil.rmtree(newest / "data"), "data missing"),
    "an empty folder": (lambda newest: [shutil.rmtree(x) for x in newest.iterdir() if x.is_dir()], "params, optimizer"),
    "damaged digests": (lambda newest: [x.write_text("{") for x in files(newest / "digests")], ""),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_one_line_that_names_the_one_before(tmp_path, what):
    saved(tmp_path).close()
    damage, reason = DAMAGE[what]
    newest = tmp_path / "checkpoints" / "4"
    damage(newest)
    checkpoints = Checkpoints(tmp_path, small_state(0))
    with pytest.raises(UserError, match=f"4: this checkpoint is damaged \\(.*{reason}") as error:
        checkpoints.restore(small_state(0))
    checkpoints.close()
    assert f"move {newest} away to go on from the one before it, {tmp_path / 'checkpoints' / '2'}" in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    shutil.rmtree(newest)
    checkpoints = Checkpoints(tmp_path, small_state(0))
    restored, _ = checkpoints.restore(small_state(0))
    checkpoints.close()
    np.testing.assert_array_equal(restored.params["a"], small_state(2).params["a"])


def test_a_state_that_is_not_finite_is_neither_saved_nor_restored(tmp_path):
    checkpoints = saved(tmp_path, (2,))
    state = small_state(4)
    state.opt_state["mu"] = {"a": state.params["a"].at[0, 0].set(jnp.nan)}
    with pytest.raises(NotFinite, match="step 4: opt_state/mu/a is not finite"):
        checkpoints.save(state, b"", {})
    assert checkpoints.latest() == 2
    checkpoints.close()


def test_digests_see_every_bit_and_no_sharding():
    tree = {"f": jnp.arange(24, dtype=jnp.float32).reshape(2, 3, 4), "h": jnp.ones(5, jnp.bfloat16), "n": jnp.int32(3)}
    sums, wrong = digests(tree)
    assert wrong == [] and sums == digests(tree)[0]
    of_f = np.asarray(tree["f"]).view(np.uint32).ravel().astype(object)  # what a checkpoint of before holds
    assert sums["f"] == (int(of_f @ (2 * np.arange(24) + 1)) % 2**32, "float32")
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2]) if len(jax.devices()) > 1 else None
    if mesh is not None:
        cut_up = jax.device_put(tree["f"], jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
        assert digests({"f": cut_up})[0]["f"] == sums["f"]
    bits = np.asarray(tree["f"]).view(np.uint32)
    for bit in (0, 13, 31):
        other = bits.copy()
        other[1, 2, 3] ^= np.uint32(1 << bit)
        assert changed({**tree, "f": jnp.asarray(other.view(np.float32))}, sums)[0] == ["f"]
    swapped = {**tree, "f": tree["f"].at[0, 0, 0].set(tree["f"][0, 0, 1]).at[0, 0, 1].set(tree["f"][0, 0, 0])}
    assert changed(swapped, sums)[0] == ["f"]
    assert changed({**tree, "f": tree["f"].astype(jnp.bfloat16)}, sums)[0] == []  # another dtype cannot be compared


def test_which_checkpoints_are_kept(tmp_path):
    for name, options, kept in (("all", {"keep": 0}, [1, 2, 3, 4, 5]), ("period", {"keep": 1, "period": 2}, [2, 4, 5])):
        saved(tmp_path / name, range(1, 6), **options).close()
        found = [path.name for path in (tmp_path / name / "checkpoints").iterdir()]
        assert sorted(found) == [*map(str, kept), "frozen"]


def test_a_config_without_keys_of_today_is_filled_and_one_of_tomorrow_is_refused(trained, corpus, tmp_path):
    config = config_of(trained, corpus).to_dict()
    del config["model"]["vision"]["output_norm"]
    del config["train"]["keep_period"]
    checkpoints = Checkpoints(tmp_path, small_state(0))
    checkpoints.save(small_state(1), b"", config)
    checkpoints.wait()
    config["model"]["llm"]["mixture"] = 8
    checkpoints.save(small_state(2), b"", config)
    checkpoints.close()
    assert reading.load_config(tmp_path / "checkpoints" / "1").to_dict() == config_of(trained, corpus).to_dict()
    with pytest.raises(UserError, match="config.model.llm.mixture of the checkpoint is a setting that this version"):
        reading.load_config(tmp_path)


def test_the_whole_state_of_a_resume_is_in_memory_once(trained, corpus, tmp_path, monkeypatch):
    """On a CPU the memory that a step frees is kept; functions are compiled into the cache that is asked for."""
    shutil.copytree(trained / "run", tmp_path / "run")
    config = typed(trained, corpus, **{"train.steps": 5})
    kept, cache = [], jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(loop, "keep_freed_memory", lambda: kept.append(True))

    def live() -> int:
        return sum(x.nbytes for x in jax.live_arrays())

    before = live()
    (tmp_path / "fresh").mkdir()
    fresh = loop.prepare(config, tmp_path / "fresh", lambda _: None)
    start = live() - before
    assert kept == [True] and jax.config.jax_compilation_cache_dir == cache
    fresh.loader.close()
    fresh.checkpoints.close()
    del fresh
    before = live()
    cached = config.changed({"train.compile_cache": str(tmp_path / "compiled")})
    try:
        again = loop.prepare(cached, tmp_path / "run", lambda _: None)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
    assert live() - before <= 1.1 * start
    assert again.records.first == 4
    again.loader.close()
    again.checkpoints.close()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["steps"] == 5
