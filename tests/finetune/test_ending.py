"""What a run is given and what it leaves at its end, with a training and a model that are stood in for."""

import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.config import StageConfig
from kangaroo_jax.evaluation.while_training import BenchmarkEvaluator
from kangaroo_jax.finetune import run as finetuning
from tests.finetune.test_finetune import clips, table  # noqa: F401 - a fixture
from tests.finetune.test_run import base, mine, one_device, run  # noqa: F401 - fixtures

Axes = pytest.importorskip("matplotlib.axes").Axes
pytestmark = pytest.mark.usefixtures("one_device")


class Run:
    """Stands in for the training and for the asking at the end; keeps what they were given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stages, self.asked, self.curves, self.ends, self.lost = [], [], {}, True, 0
        monkeypatch.setattr(finetuning, "rehearse", lambda *_: ("compiled", 1.0))
        monkeypatch.setattr(finetuning, "train", self.train)
        monkeypatch.setattr(finetuning, "evaluate_checkpoint", self.evaluate)
        real = Axes.plot

        def plot(axes, *values, **keys):
            self.curves[keys["label"]] = [list(some) for some in values if not isinstance(some, str)]
            return real(axes, *values, **keys)

        monkeypatch.setattr(Axes, "plot", plot)

    def train(self, config, workdir, *, evaluator, step_fn, tell):
        assert evaluator is BenchmarkEvaluator
        self.stages.append((StageConfig.from_config(config), step_fn))
        (workdir / "checkpoints").mkdir(exist_ok=True)
        if not self.ends:
            raise KeyboardInterrupt
        lines = [{"step": 1, "loss": 4.0}, {"step": 1, "eval": {"loss": 5.0, "questions": 0.5}}]
        lines += [{"step": 2, "loss": 3.0}, {"step": 2, "eval": {"loss": 6.0, "questions": 0.25}}]
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        shutil.move(workdir / "checkpoints", workdir / "adapter")

    def evaluate(self, checkpoint, settings, folder, loading, share, tell):
        (questions,) = settings.benchmarks
        self.asked.append((checkpoint, Path(questions), Path(folder), (share.index, share.count)))
        return [{"protocols": {"strict": {"media": self.lost}}}]


# Settings of a base's own training that are not those of a run.
OF_ITS_TRAINING = {"eval.share": 0.5, "eval.data": "d", "eval.prompt": "p", "eval.best": "x", "eval.patience": 9}
OF_ITS_TRAINING |= {"train.keep_checkpoints": 7, "train.keep_period": 5, "train.epochs": 2.0, "train.profile": (1, 2)}
OF_ITS_TRAINING |= {"train.mesh": (1, 1, 1, 1), "data.loss_on": "caption", "optimizer.weight_decay": 0.5}


def base_with(folder: Path, base: Path, keys: dict) -> Path:  # noqa: F811
    """A base with other settings in its checkpoint."""
    shutil.copytree(base, folder)
    config = reading.load_config(base).copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(keys)
    shutil.rmtree(folder / "checkpoints" / "1" / "config")
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(folder / "checkpoints" / "1" / "config", args=ocp.args.JsonSave(config.to_dict()))
    return folder


def quantised(folder: Path, base: Path, form: str) -> Path:  # noqa: F811
    """A base whose checkpoint has a kernel in this format."""
    params = base_with(folder, base, {}) / "checkpoints" / "1" / "params"
    shutil.rmtree(params)
    name = "llm/layers/attention/key"
    with ocp.StandardCheckpointer() as writer:
        writer.save(params, {f"{name}/kernel": jnp.zeros((2, 8), form), f"{name}/kernel_scale": jnp.ones((2, 1))})
    return folder


def conversations(folder: Path, *stems: str) -> tuple[str, ...]:
    """Files of a conversation each."""
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "left"}]
    for stem in stems:
        (folder / f"{stem}.jsonl").write_text(json.dumps({"id": stem, "conversations": turns}) + "\n")
    return tuple(str(folder / f"{stem}.jsonl") for stem in stems)


def names(path: str | Path) -> list[str]:
    return [Path(row["video"][0] if isinstance(row["video"], list) else row["video"]).stem for row in rows(path)]


def rows(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_what_is_held_out_is_measured_and_asked_of_the_runs_own_model(base, mine, tmp_path, monkeypatch, capsys):  # noqa: F811
    stood, workdir = Run(monkeypatch), tmp_path / "run"
    words = (f"--base={base}", f"--data={mine}", f"--workdir={workdir}", "--rank=4", "--patience=2")
    run(*words, "--config.train.steps=10")
    ((stage, step_fn),) = stood.stages
    learnt, asked = names(stage.data.train[0]), names(stage.eval.held_out[0])
    assert len(learnt) == 8 and len(asked) == 2 and not {*learnt} & {*asked}
    assert names(stage.eval.benchmarks[0]) == asked and step_fn == "compiled"
    told = (stage.eval.best, stage.eval.patience, stage.eval.every, stage.train.checkpoint_every, stage.train.steps)
    assert told == ("loss", 2, 2 * 25, 2 * 25, 10) and stage.lora.rank == 4 and not stage.lora.keep_state
    assert Path(stage.init_from) == base / "checkpoints" / "1"
    assert {row["answer"] for row in rows(stage.eval.benchmarks[0])} == {"left", "right"}
    assert stood.asked == [(str(workdir), Path(stage.eval.benchmarks[0]), workdir / "held_out", (1, 1))]
    assert stood.curves == {
        "loss, training": [[1, 2], [4.0, 3.0]],
        "loss, held out": [[1, 2], [5.0, 6.0]],
        "right answers, held out": [[1, 2], [0.5, 0.25]],
    }
    told = capsys.readouterr().out
    assert f"kangaroo chat --checkpoint={workdir}, kangaroo convert --from={workdir}" in told
    assert "cannot be read" not in told
    stood.lost = 1
    run(*words)
    assert "questions about clips that cannot be read, which count as wrong: 1 of 2\n" in capsys.readouterr().out


def test_what_is_asked_for_is_what_the_training_is_given(base, mine, tmp_path, monkeypatch):  # noqa: F811
    stood, replay = Run(monkeypatch), conversations(tmp_path, "a", "b")
    own = base_with(tmp_path / "base", base, {"data.train": conversations(tmp_path, "own"), **OF_ITS_TRAINING})
    words = (f"--base={own}", f"--data={mine}")
    flags = "--rank=3 --alpha=5 --targets=llm/.*/mlp/.* --quantize=int8 --keep-state --learning-rate=0.01 --packs=3"
    flags += " --frames=3 --epochs=40 --seed=5"
    run(*words, f"--workdir={tmp_path / 'one'}", *flags.split(), *(f"--replay={path}" for path in replay))
    run(*words, f"--workdir={tmp_path / 'two'}", "--full", "--freeze=vision/.*", "--freeze=llm/.*")
    (one, _), (two, _) = stood.stages
    lora = (one.lora.rank, one.lora.alpha, one.lora.targets, one.lora.quantize, one.lora.keep_state)
    assert lora == (3, 5.0, "llm/.*/mlp/.*", "int8", True) and one.optimizer.trainable == ((".*", 1.0),)
    assert (one.optimizer.learning_rate, one.data.packs_per_batch, one.seed) == (0.01, 3, 5)
    assert (one.data.max_frames, one.data.long_max_frames) == (3, 3)
    assert one.data.train[1:] == replay and one.data.weights == (1.0, 0.5, 0.5)
    assert (two.lora.rank, two.lora.keep_state, two.optimizer.learning_rate) == (0, True, pytest.approx(2e-4))
    assert two.optimizer.trainable == (("vision/.*", None), ("llm/.*", None), (".*", 1.0))
    assert [Path(path).name for path in two.data.train] == ["train.jsonl", "own.jsonl"]
    assert two.data.weights == (1.0, 1.0) and two.train.steps == 250
    for stage in (one, two):  # nothing of what the base's training measured, kept and showed
        assert (stage.eval.share, stage.eval.data, stage.eval.prompt, stage.eval.best) == (1.0, "", "", "loss")
        assert (stage.train.keep_checkpoints, stage.train.keep_period, stage.train.epochs) == (1, 0, 0.0)
        assert (stage.train.profile, stage.train.mesh, stage.data.loss_on) == ((), (), "assistant")
        assert stage.optimizer.weight_decay == 0.0
    run(*words, f"--workdir={tmp_path / 'other'}", "--seed=6")
    assert {*names(one.data.train[0])} != {*names(stood.stages[2][0].data.train[0])}, "seeds split otherwise"
    (tmp_path / "own.jsonl").unlink()
    run(*words, f"--workdir={tmp_path / 'none'}")
    assert len(stood.stages[3][0].data.train) == 1 and stood.stages[3][0].data.weights == ()


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_quantised_base_keeps_its_format(form, base, mine, tmp_path, monkeypatch):  # noqa: F811
    stood, own = Run(monkeypatch), quantised(tmp_path / "base", base, form)
    run(f"--base={own}", f"--data={mine}", f"--workdir={tmp_path / 'run'}", "--rank=4")
    assert stood.stages[0][0].lora.quantize == form


def test_replay_leaves_half_of_a_step_to_the_examples(base, mine, tmp_path, monkeypatch, capsys):  # noqa: F811
    stood, (replay,) = Run(monkeypatch), conversations(tmp_path, "a")
    drawn = iter((4.0, 4.0))
    monkeypatch.setattr(finetuning, "draws_a_step", lambda *_: (next(drawn), 0.0))
    words = (f"--base={base}", f"--data={mine}", "--rank=4", "--epochs=100")
    run(*words, f"--workdir={tmp_path / 'one'}")
    run(*words, f"--workdir={tmp_path / 'two'}", f"--replay={replay}")
    assert [stage.train.steps for stage, _ in stood.stages] == [100 * 8 / 4, 100 * 8 / 2]
    assert [stage.eval.every for stage, _ in stood.stages] == [40, 80]
    told = capsys.readouterr().out
    assert "200 steps: 100.0 epochs over 8 examples, 4.0 of them a step\nno replay" in told
    half = f"half of the samples are replayed from {replay}"
    assert f"400 steps: 100.0 epochs over 8 examples, 2.0 of them a step\n{half}" in told


def test_a_base_that_never_saw_a_video_is_said(base, mine, tmp_path, monkeypatch, capsys):  # noqa: F811
    Run(monkeypatch)
    one = {f"data.{key}": 1 for key in ("min_frames", "max_frames", "long_min_frames", "long_max_frames")}
    said = {}
    text, (replay,) = one | {"data.frames_per_pack": 0}, conversations(tmp_path, "a")
    for name, keys in {"stage0": text, "stage1": one, "assembled": {}, "stage4": {}}.items():
        own = base_with(tmp_path / name, base, {"stage": name, **keys})
        words = ("--rank=4", "--dry-run", f"--replay={replay}")
        run(f"--base={own}", f"--data={mine}", f"--workdir={tmp_path / 'run' / name}", *words)
        said[name] = [line for line in capsys.readouterr().out.splitlines() if "warning: the base was" in line]
    assert said["stage4"] == []
    (line,) = said["stage0"]
    assert "with at most one frame (stage0): no pack has room for a frame, so videos teach nothing; give a" in line
    (line,) = said["stage1"]
    assert "trained with at most one frame (stage1): a video is one frame here, too; give a base that was" in line
    (line,) = said["assembled"]
    assert "was put together from other models and not trained since: it has not learnt to see a video" in line


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--alpha=0", "--alpha=0: is no number above 0"),
        ("--epochs=0", "--epochs=0: is no number above 0"),
        ("--epochs=-1", "--epochs=-1: is no number above 0"),
        ("--learning-rate=0", "--learning-rate=0: is no number above 0"),
        ("--packs=0", "--packs=0: is no whole number of 1 or more"),
        ("--frames=0", "--frames=0: is no whole number of 1 or more"),
        ("--targets=nowhere", "config.lora.targets 'nowhere' matches no linear map"),
        ("--targets=(", "config.lora.targets '(' is no regular expression"),
        ("--quantize=int3", "config.lora.quantize is 'int3'"),
        ("--replay=none.jsonl", "none.jsonl: cannot read the annotations (No such file"),
        ("--replay=PICTURE", "mine.png, line 1: not JSON"),
        ("--full --freeze=.*", "config.optimizer.trainable leaves nothing to train"),
        ("--full --freeze=(", "no regular expression"),
        ("--config.data.fps=0", "config.data.fps is 0.0: must be above 0"),
    ],
)
def test_a_wrong_setting_writes_nothing(word, message, base, mine, tmp_path, monkeypatch, capsys):  # noqa: F811
    stood = Run(monkeypatch)
    (tmp_path / "mine.png").write_bytes(b"x" * 100)
    words = word.replace("PICTURE", str(tmp_path / "mine.png")).split()
    run(f"--base={base}", f"--data={mine}", f"--workdir={tmp_path / 'run'}", *words, code=2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists() and not stood.stages


def test_a_run_that_is_stopped_ends_when_it_is_given_again_and_once_more(base, mine, tmp_path, monkeypatch):  # noqa: F811
    stood, workdir = Run(monkeypatch), tmp_path / "run"
    words = (f"--base={base}", f"--data={mine}", f"--workdir={workdir}", "--rank=4")
    stood.ends = False
    run(*words, code=130)
    assert not stood.asked and not (workdir / "curves.png").exists()
    stood.ends = True
    run(*words)
    assert len(stood.asked) == 1 and (workdir / "curves.png").exists()
    (workdir / "curves.png").unlink()
    run(*words)  # what a kill left to do after the training's own end
    assert len(stood.asked) == 2 and (workdir / "curves.png").exists()
    assert [step for _, step in stood.stages] == ["compiled", None, None]


def test_only_short_answers_about_files_that_are_here_are_asked(base, clips, tmp_path, monkeypatch, capsys):  # noqa: F811
    stood = Run(monkeypatch)
    learnt = table(tmp_path, *((str(clips / f"c{i}.mp4"), "Which?", "left") for i in range(4)), name="learnt.csv")
    held = [(str(clips / "c5.mp4"), "left"), (str(clips / "c6.mp4"), "right " * 20), ("https://0.0.0.0/c.mp4", "up")]
    held_out = table(tmp_path, *((video, "Which?", answer) for video, answer in held), name="held.csv")
    words = (f"--base={base}", f"--data={learnt}", f"--held-out={held_out}", "--rank=4")
    run(*words, f"--workdir={tmp_path / 'run'}")
    (stage, _) = stood.stages[-1]
    assert names(stage.eval.held_out[0]) == ["c5", "c6", "c"] and names(stage.eval.benchmarks[0]) == ["c5"]
    assert "held-out videos that are addresses: 1; the loss is measured, but nothing is" in capsys.readouterr().out
    table(tmp_path, (held[1][0], "Which?", held[1][1]), name="held.csv")
    run(*words, f"--workdir={tmp_path / 'none'}")
    assert stood.stages[-1][0].eval.benchmarks == () and len(stood.asked) == 1
    table(tmp_path, (str(clips / "c1.mp4"), "Which?", "left"), name="held.csv")
    run(*words, f"--workdir={tmp_path / 'shared'}", code=2)
    assert "files of --held-out that are in --data, too: 1, the first" in capsys.readouterr().err


def test_a_folder_with_another_run_stays_as_it_is(base, mine, clips, tmp_path, monkeypatch, capsys):  # noqa: F811
    Run(monkeypatch)
    workdir = tmp_path / "run"
    words = (f"--base={base}", f"--workdir={workdir}", "--rank=4")
    run(*words, f"--data={mine}")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    fewer = table(tmp_path, *((str(clips / f"c{i}.mp4"), "What?", "left" if i % 2 else "right") for i in range(8)))
    for more in ((f"--data={fewer}",), (f"--data={mine}", "--seed=1"), (f"--data={fewer}", "--dry-run")):
        run(*words, *more, code=2)
        error = capsys.readouterr().err
        assert "holds a run with other examples" in error and error.count("\n") == 1
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    (workdir / "data" / "train.jsonl").unlink()
    run(*words, f"--data={mine}", code=2)
    assert "holds another run, without train.jsonl" in capsys.readouterr().err


def test_clips_that_were_moved_are_the_same_examples(base, clips, tmp_path, monkeypatch):  # noqa: F811
    stood = Run(monkeypatch)
    for place in ("here", "there"):
        shutil.copytree(clips, tmp_path / place)
        some = ((f"c{i}.mp4", "Which?", "left" if i % 2 else "right") for i in range(10))
        table(tmp_path / place, *some)
    words = (f"--base={base}", f"--workdir={tmp_path / 'run'}", "--rank=4", f"--held-out={tmp_path / 'h.csv'}")
    shutil.copy(clips / "copy.mp4", tmp_path)
    table(tmp_path, ("copy.mp4", "Which?", "left"), name="h.csv")
    for place in ("here", "there"):
        run(*words, f"--data={tmp_path / place / 'mine.csv'}")
    assert len(stood.stages) == 2 and "there" in (tmp_path / "run" / "data" / "train.jsonl").read_text()


@pytest.mark.parametrize(
    ("workdir", "data", "message"),
    [
        ("BASE", "MINE", "--workdir=.*: is the folder of the base; give another"),
        ("BASE/checkpoints", "MINE", "--workdir=.*: is the folder of the base; give another"),
        ("BASE/checkpoints/1", "MINE", "--workdir=.*: is the folder of the base; give another"),
        ("LABELS", "LABELS", "--workdir=.*: is in the folder of the data, .*labels; give one beside it"),
        ("LABELS/cat/run", "LABELS", "--workdir=.*: is in the folder of the data, .*labels; give one beside it"),
        ("RUN", "RUN/data/train.jsonl", "train.jsonl: is written anew by a run in .*; give another --workdir, or a"),
        ("FILE", "MINE", "--workdir=.*FILE: is a file; give a folder"),
        ("FILE/run", "MINE", r"FILE/run: cannot be made a working folder \(Not a directory\)"),
        ("NEW", "none.csv", "none.csv: no such file or folder"),
        ("NEW", "LABELS", "holds no video or image; each sub-folder of --data is a label"),
    ],
)
def test_a_place_that_cannot_be_is_one_line_and_nothing_is_written(
    workdir,
    data,
    message,
    base,  # noqa: F811
    mine,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    Run(monkeypatch)
    shutil.copytree(base, tmp_path / "BASE")
    shutil.copy(mine, tmp_path / "MINE")
    (tmp_path / "MINE").rename(tmp_path / "MINE.csv")
    for label in ("cat", "dog"):
        (tmp_path / "labels" / label).mkdir(parents=True)
    (tmp_path / "FILE").write_text("x")
    (tmp_path / "RUN" / "data").mkdir(parents=True)
    (tmp_path / "RUN" / "data" / "train.jsonl").write_text("{}\n")
    before = sorted(tmp_path.rglob("*"))
    places = [tmp_path / place.replace("MINE", "MINE.csv").replace("LABELS", "labels") for place in (workdir, data)]
    run(f"--base={tmp_path / 'BASE'}", f"--workdir={places[0]}", f"--data={places[1]}", "--rank=4", code=2)
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
