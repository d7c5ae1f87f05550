"""What cannot be done is one line that says what to do, and exit code 2."""

import errno
import re
from pathlib import Path

import jax
import pytest

from kangaroo_jax.cli import main as cli
from kangaroo_jax.config import StageConfig, stage_config
from kangaroo_jax.data.tokenizer import train_sentencepiece
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.chat import Kangaroo
from kangaroo_jax.training import loop
from tests.cli.running import TRAIN, run

BAD = {
    ("train",): "--config is missing",
    ("train", "--config=stage3_refine:tiny"): "--workdir is missing",
    ("train", "--config=stage3_refine:tinny", "--workdir=W"): "unknown preset 'tinny'",
    (
        "train",
        "--config=configs/stage3_refin.py",
        "--workdir=W",
    ): "no config 'stage3_refin' (did you mean 'stage3_refine'?)",
    ("train", "--config=/no/folder/mine.py", "--workdir=W"): "/no/folder/mine.py: no such config file",
    (*TRAIN, "--workdir=W", "--config.optimizer.learning_rat=1"): (
        "no key 'optimizer.learning_rat' (did you mean 'optimizer.learning_rate'?)"
    ),
    (*TRAIN, "--workdir=W", "--config.learning_rate=1"): "(did you mean 'optimizer.learning_rate'?)",
    (*TRAIN, "--workdir=W", "--config.train.steps=many"): "--config.train.steps=many",
    (*TRAIN, "--workdir=W", "--config.data=3"): "--config.data=3",
    (*TRAIN, "--workdir=W", "--config.train.mesh[1]=2"): "(did you mean 'train.mesh'?)",
    (*TRAIN, "--wrokdir=W"): "train: no flag --wrokdir; did you mean --workdir?",
    (*TRAIN, "--workdir=W", "extra"): "what is 'extra'?",
    (*TRAIN, "--workdir=F/x"): "cannot be made a working folder",
    ("train", "--strict=perhaps"): "--strict=perhaps",
    ("curriculum", "--workdir=W", "--data=D"): "--tokenizer is missing",
    (
        "curriculum",
        "--workdir=W",
        "--data=D",
        "--tokenizer=T",
        "--preset=tin",
    ): "no preset 'tin' (did you mean 'tiny'?)",
    ("curriculum", "--workdir=W", "--data=D", "--tokenizer=T"): "stage1.jsonl: no such file",
    ("quickstart", "--scale=0"): "--scale=0",
    ("bench", "convert", "--folder=F"): "F: cannot be made a working folder",
    ("quickstart", "--fast"): "no flag --fast",
    ("chat",): "--checkpoint is missing",
    ("chat", "--checkpoint=X"): "kangaroo convert --from=",
    ("chat", "--checkpoint=W"): "W: no such checkpoint folder",
    ("chat", "--checkpoint=W", "--video=none.mp4"): "none.mp4",
    ("chat", "--checkpoint=W", "--video=F", "--query=?"): "F: not a readable video",
    ("chat", "--checkpoint=W", "--video=E", "--query=?"): "E: ",
    ("chat", "--checkpoint=W", "--query="): "the query is empty",
    ("chat", "--checkpoint=W", "--start=1"): "start and end belong to a video",
    ("chat", "--checkpoint=W", "--temperature=-1"): "--temperature=-1",
    ("chat", "--checkpoint=W", "--top-p=2"): "top_p 2.0: must be",
    ("chat", "--checkpoint=W", "--top_p=2"): "top_p 2.0: must be",
    ("chat", "--checkpoint="): "chat: --checkpoint is missing (folder that training wrote",
    ("chat", "--checkpoint"): "chat: --checkpoint needs a value",
    ("chat", "--checkpoint=W", "--query", "-5?"): "one that begins with a dash is written --query=VALUE",
    ("chat", "--checkpoint=W", "--max-new-tokens=3.5"): "--max-new-tokens=3.5: is no whole number of 1 or more",
    ("chat", "--checkpoint=W", "--start=nan"): "--start=nan: is no number of 0 or more",
    ("chat", "--checkpoint=W", "-q", "x"): "chat: no flag -q; ",
    ("chat", "--checkpoint=W", "--config.seed=1"): "chat: no flag --config.seed; ",
    (*TRAIN, "--workdir=W", "--nostrict"): "no flag --nostrict; did you mean --no-strict?",
    (*TRAIN, "--workdir=W", "--config.train.tensorboard", "on"): "what is 'on'?",
    ("curate", "selct", "--output=W"): "curate: no job 'selct' (did you mean 'select'?); there are select, explain,",
    ("curate", "--output=W", "select"): "curate: select stands first: kangaroo curate select --output=W",
    ("chat", "--checkpoint=W", "--seed=" + "9" * 5000): "9...: is no whole number of 0 or more",
    ("curate", "--output=W", "--input=,"): "curate: --input is missing",
    ("curate", "select", "--output=W", "--engine=ray"): "curate select: no flag --engine; ",
    ("curate", "explain", "--output=W"): "curate explain: ID is missing",
    ("curate", "explain", "a", "b", "--output=W"): "curate explain: what is 'b'?",
    ("curate", "select", "--output=W", "--config.selct.max_face=1"): "curate select: the config has no key",
    ("data",): "data: name a job of it, one of check, stats, build, show",
    ("data", "chek", "x"): "data: no job 'chek' (did you mean 'check'?)",
    ("data", "check", "x", "--wokers=2"): "data check: no flag --wokers; did you mean --workers?",
    ("data", "check", "x", "--workers=0"): "data check: --workers=0: is no whole number of 1 or more",
    ("data", "build", "x", "--name=a", "--out=W", "--embed=yes"): "--embed=yes: is none of true, false",
    ("data", "stats", "--tokenizer=T"): "data stats: SOURCES is missing",
    ("data", "show", "x", "y", "--tokenizer=T"): "data show: x: is no whole number of 0 or more",
    ("bench", "packin"): "bench: no job 'packin' (did you mean 'packing'?)",
    ("bench", "packing", "--rows=3"): "bench packing: no flag --rows; did you mean --row?",
    ("bench", "train", "--steps=0"): "bench train: --steps=0: is no whole number of 1 or more",
    ("bench", "packing", "--samples=x"): "bench packing: --samples=x: is no whole number of 1 or more",
}


@pytest.mark.parametrize("arguments", BAD, ids=lambda words: " ".join(words)[:100])
def test_bad_input_is_one_line_and_exit_code_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("F").write_text("text")
    Path("E").touch()
    Path("X").mkdir()
    Path("X/model.safetensors").touch()
    code, _, error = run(capsys, *arguments)
    assert code == 2 and BAD[arguments] in error
    assert error.startswith("kangaroo: ") and error.endswith("\n") and error.count("\n") == 1


def test_a_tokenizer_of_another_preset_names_the_preset(tmp_path):
    config = stage_config("kangaroo_8b")
    config.data.tokenizer = str(
        train_sentencepiece(["What moves, and which way?"], tmp_path / "t.model", vocab_size=285)
    )
    with pytest.raises(UserError, match="this is kangaroo_8b: say :base_100m or :tiny"):
        loop.open_tokenizer(StageConfig.from_config(config))
    config.data.tokenizer = "none.model"
    with pytest.raises(UserError, match="the quickstart leaves one for the preset tiny"):
        loop.open_tokenizer(StageConfig.from_config(config))


def test_nothing_is_converted_where_it_cannot_be_verified(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, error = run(capsys, "convert", "--from=X", f"--to={tmp_path / 'Y'}", "--verify")
    assert code == 2 and "--verify runs the model in PyTorch" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; nothing finished is lost"),
        (OSError(errno.EROFS, "Read-only file system", "a/b"), "a/b: Read-only file system; nothing finished is lost"),
        (PermissionError(errno.EACCES, "Permission denied", b"a\xe9"), "Permission denied; nothing finished is lost"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a/metrics.jsonl"), "a/metrics.jsonl: Is a directory; noth"),
        (ValueError("RESOURCE_EXHAUSTED: x: No space left on device [os_error_code='28']"), "kangaroo: No space left"),
    ],
    ids=["full", "read-only", "denied", "a folder", "full of Orbax"],
)
def test_a_disk_that_cannot_be_written_is_one_line(error, line, capsys, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(loop, "train", fail)
    code, _, said = run(capsys, *TRAIN, f"--workdir={tmp_path}")
    assert code == 2 and line in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "text"), [(RuntimeError, "Unable to initialize backend 'tpu': no\nsuch thing"), (AssertionError, "")]
)
@pytest.mark.parametrize(
    "job", [["quickstart", "--workdir=new"], TRAIN + ["--workdir=new"], ["chat", "--checkpoint=x"]]
)
def test_devices_that_are_not_there_are_one_line_before_any_work(job, kind, text, capsys, tmp_path, monkeypatch):
    """Also where what asked for them has made another error of it."""

    def none() -> list:
        raise kind(text)

    def load(path, **held) -> None:
        try:
            jax.devices()
        except (RuntimeError, AssertionError) as error:
            raise UserError("this checkpoint is damaged") from error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.setattr(jax, "devices", none)
    monkeypatch.setattr(Kangaroo, "load", load)
    code, out, error = run(capsys, *job, *(["--query=What?"] if job[0] == "chat" else []))
    assert (code, out) == (2, "") and error.count("\n") == 1
    assert error.startswith("kangaroo: JAX_PLATFORMS=tpu: JAX finds no such devices here") and "damaged" not in error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("module", "how"),
    [
        ("kangaroo_jax.curation.stages.pictures", r"pip install -e '.*\[curation\]'"),
        ("kangaroo_jax.data.media.tables", "kangaroo doctor says which extra brings it"),
    ],
)
def test_a_package_that_an_extra_brings_is_named_with_the_extra(module, how, monkeypatch, capsys):
    def run(_: list[str]) -> None:
        exec("import no_such_package.of_it", {"__name__": module})

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["curate"]) == 2
    assert re.fullmatch(f"kangaroo: the package no_such_package is missing: {how}\n", capsys.readouterr().err)


def test_a_module_of_our_own_that_is_missing_is_a_fault(monkeypatch):
    def run(_: list[str]) -> None:
        exec("import kangaroo_jax.no_such_room", {"__name__": "kangaroo_jax.curation"})

    monkeypatch.setattr(cli, "_run", run)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["curate"])
