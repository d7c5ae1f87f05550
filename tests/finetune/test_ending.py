"""What a run is given and what it leaves at its end, with a training and a model that are stood in for."""

import json
import re
import shutil
from pathlib import Path

import pytest

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
        self.stages, self.asked, self.curves, self.ends = [], [], {}, True
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
    told = (stage.eval.best, stage.eval.patience, stage.eval.every, stage.train.checkpoint_every, stage.eval.share)
    assert told == ("loss", 2, 2 * 25, 2 * 25, 1.0) and not stage.lora.keep_state
    assert Path(stage.init_from) == base / "checkpoints" / "1"
    assert {row["answer"] for row in rows(stage.eval.benchmarks[0])} == {"left", "right"}
    assert stood.asked == [(str(workdir), Path(stage.eval.benchmarks[0]), workdir / "held_out", (1, 1))]
    assert stood.curves == {
        "loss, training": [[1, 2], [4.0, 3.0]],
        "loss, held out": [[1, 2], [5.0, 6.0]],
        "right answers, held out": [[1, 2], [0.5, 0.25]],
    }
    assert f"kangaroo chat --checkpoint={workdir}, kangaroo convert --from={workdir}" in capsys.readouterr().out


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
    assert "1 of the held-out videos are addresses: the loss is measured, but nothing is" in capsys.readouterr().out
    table(tmp_path, (held[1][0], "Which?", held[1][1]), name="held.csv")
    run(*words, f"--workdir={tmp_path / 'none'}")
    assert stood.stages[-1][0].eval.benchmarks == () and len(stood.asked) == 1


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
