"""The command line: what it lists, what it passes on, and that bad input is one line and exit code 2."""

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from kangaroo_jax.cli import arguments
from kangaroo_jax.cli import main as cli
from kangaroo_jax.cli.chat import chat
from kangaroo_jax.cli.data import check
from kangaroo_jax.cli.evaluator import evaluator
from kangaroo_jax.cli.jobs import JOBS, commands_of
from kangaroo_jax.cli.train import train
from kangaroo_jax.config import StageConfig, stage_config
from kangaroo_jax.data.tokenizer import train_sentencepiece
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.chat import Kangaroo
from kangaroo_jax.planning.here import explained_memory
from kangaroo_jax.training import curriculum, loop

ROOT = Path(__file__).parents[2]
NO_BENCHES = {"answering", "__init__", "faulty_server", "torch_kangaroo", "health", "load"}
TRAIN = ["train", "--config=stage3_refine:tiny"]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def trained(monkeypatch) -> list:
    """Catches the configs that would be trained."""
    configs: list = []
    monkeypatch.setattr(loop, "train", lambda config, workdir, **_: configs.append((config, workdir)))
    return configs


def test_help_lists_every_job(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(job.summary in out for job in cli.JOBS.values())


def test_module_is_the_same_command(capsys):
    command = [sys.executable, "-m", "kangaroo_jax", "trian"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert run(capsys, "trian") == (2, "", done.stderr)
    assert "did you mean 'train'?" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="of the C library of Linux")
@pytest.mark.parametrize(
    ("given", "job", "seen"),
    [
        ("", "train", ["", "glibc.malloc.hugetlb=1"]),
        ("glibc.malloc.check=0", "train", ["glibc.malloc.check=0", "glibc.malloc.check=0:glibc.malloc.hugetlb=1"]),
        ("glibc.malloc.hugetlb=0", "train", ["glibc.malloc.hugetlb=0"]),
        ("", "trian", [""]),
    ],
)
def test_a_job_that_computes_begins_anew_with_huge_pages_as_the_same_process(given, job, seen):
    code = (
        "import os, sys; print(os.getpid(), os.environ['GLIBC_TUNABLES'], flush=True); "
        "from kangaroo_jax.cli import main as cli; sys.exit(cli.start())"
    )
    environment = {**os.environ, "GLIBC_TUNABLES": given}
    with subprocess.Popen(
        [sys.executable, "-c", code, job],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    ) as process:
        out, error = process.communicate(timeout=120)
    assert out == "".join(f"{process.pid} {tunables}\n" for tunables in seen)
    assert process.returncode == 2 and error.count("\n") == 1


def test_help_of_a_job_and_version(capsys):
    for job in ("train", "curriculum", "quickstart", "chat"):
        code, out, _ = run(capsys, job, "--help")
        assert code == 0 and cli.JOBS[job].summary[1:] in out
    code, out, _ = run(capsys, "chat", "--help")
    for flag in ("checkpoint", "video", "image", "query", "temperature", "top-p", "max-new-tokens", "seed"):
        assert f"--{flag} " in out
    assert run(capsys, "--version") == (0, "kangaroo 0.1.0\n", "")


def test_help_says_what_there_is(capsys):
    code, out, _ = run(capsys, "train", "--help")
    assert code == 0 and all(word in out for word in ("--config.KEY=VALUE", "kangaroo_8b", "stage3_refine"))
    assert "--config.KEY=VALUE" in run(capsys, "curriculum", "--help")[1]
    out = run(capsys, "curate", "--help")[1]
    for word in ("select", "explain", "report", "export", "doctor"):
        assert f"\n  {word} " in out
    out = run(capsys, "curate", "select", "--help")[1]
    assert "kangaroo curate select" in out and "--output " in out and "--engine " not in out
    code, out, _ = run(capsys, "bench", "--help")
    assert code == 0
    modules = {path.stem for path in (ROOT / "kangaroo_jax" / "bench").glob("*.py")}
    assert all(f"\n  {name} " in out for name in modules - NO_BENCHES | {"train", "vision", "train-vs-torch"})


EVERY = [(job, name) for job in JOBS for name in commands_of(job)]


@pytest.mark.parametrize(("job", "name"), EVERY, ids=" ".join)
def test_help_begins_with_a_command_that_can_be_run_and_the_flags_that_matter(job, name, capsys):
    words, command = [job, *name.split()], commands_of(job)[name]
    code, out, _ = run(capsys, *words, "--help")
    example = shlex.split(out.splitlines()[0])
    assert code == 0 and example[: len(words) + 1] == ["kangaroo", *words]
    call = arguments.bind(" ".join(words), command, example[len(words) + 1 :])
    assert call.command is command
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    described = arguments.arguments_of(command, described=True)
    shown = [word for word in listed if word.startswith("--") or word.isupper()]
    assert shown == [argument.name.replace("--id", "ID").replace("--number", "NUMBER") for argument in described]
    assert all(argument.parameter.help for argument in described)
    assert "_" not in "".join(flag for flag in listed if flag.startswith("--"))
    head = out.partition("\nmore flags:")[0] if len(described) > 5 else out
    assert sum(f"\n  {argument.name} " in head for argument in described[:5]) == min(len(described), 5)


@pytest.mark.parametrize("job", [job for job in JOBS if "" not in commands_of(job)])
def test_help_of_a_job_of_jobs_lists_them(job, capsys):
    code, out, _ = run(capsys, job, "--help")
    assert code == 0 and JOBS[job].summary in out and all(f"\n  {name} " in out for name in commands_of(job))
    assert run(capsys, *out.splitlines()[0].split()[1:])[0] == 0


def test_a_flag_is_written_with_hyphens_and_was_with_underscores(tmp_path, capsys):
    for flag in ("--max-new-tokens", "--max_new_tokens"):
        call = arguments.bind("chat", chat, ["--checkpoint=X", f"{flag}=3", "--query=--a_b=c", "--top_p", "0.5"])
        assert call.given == {"checkpoint": "X", "max_new_tokens": 3, "query": "--a_b=c", "top_p": 0.5}
    call = arguments.bind(
        "train", train, ["--config=a", "--workdir=b", "--config=c", "--strict", "--config.a_b", "x_y"]
    )
    assert call.given == {"config": "c", "workdir": "b", "strict": True, "overrides": ["--config.a_b", "x_y"]}
    call = arguments.bind("data check", check, ["--media", "a", "b", "--media=c", "--workers", "3", "--", "-x"])
    assert (call.positional, call.given) == (("-x",), {"media": ["a", "b", "c"], "workers": 3})


def test_a_table_of_the_docs_is_found_from_any_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "plan", "--table=docs/plan_compiled.jsonl")
    assert code == 0 and out.startswith("|")
    assert run(capsys, "plan", "--table=docs/none.jsonl")[0] == 2


def test_a_row_is_benched_for_the_stages_whose_samples_it_holds(capsys):
    assert run(capsys, "bench", "packing", "--row=20480x144", "--samples=50")[0] == 0
    config = [
        "bench",
        "packing",
        "--config",
        "stage4_instruct:kangaroo_8b",
        "--row=20480x144",
        "--samples=50",
        "--json",
    ]
    assert run(capsys, *config)[0] == 0


def test_train_passes_its_config_on(capsys, tmp_path, trained):
    changes = [
        "--config.optimizer.learning_rate=1e-3",
        "--config.train.mesh=1,1,1,1",
        "--config.data.train=b.jsonl",
        "--config.data.train=a.jsonl",
        "--config.train.steps=7",
        "--config.train.steps",
        "9",
        "--config.optimizer.trainable=(('.*', 1.0),)",
        "--config.optimizer.trainable=(('vision/.*', 0.5), ('.*', None))",
        "--config.train.tensorboard",
        "--config.data.fps",
        "2",
    ]
    assert run(capsys, *TRAIN, f"--workdir={tmp_path / 'new'}", "--strict", *changes)[0] == 0
    ((config, workdir),) = trained
    assert workdir == tmp_path / "new" and workdir.is_dir()
    assert config.stage == "stage3_refine" and config.model.preset == "tiny" and config.data.strict
    assert config.optimizer.learning_rate == 1e-3 and config.data.train == ("a.jsonl",)
    assert config.train.steps == 9 and config.optimizer.trainable == (("vision/.*", 0.5), (".*", None))
    assert config.train.mesh == (1, 1, 1, 1) and config.train.tensorboard and config.data.fps == 2.0


def test_curriculum_passes_its_arguments_on(capsys, tmp_path, monkeypatch):
    calls: list = []
    monkeypatch.setattr(curriculum, "run", lambda *args, **kwargs: calls.append((args, kwargs)))
    command = ["curriculum", "--preset=base_100m", f"--workdir={tmp_path}", "--data=D", "--tokenizer=T"]
    assert run(capsys, *command, "--config.train.steps=7", "--config.seed=3")[0] == 0
    overrides = {"train.steps": 7, "seed": 3}
    given = {"data": "D", "tokenizer": "T", "overrides": overrides}
    given |= {"evaluator": evaluator, "explained": explained_memory}
    assert calls == [(("base_100m", tmp_path), given)]


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


def test_interruption_is_130_and_a_bug_is_no_bad_input(capsys, tmp_path, monkeypatch):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", stop)
    assert run(capsys, *TRAIN, f"--workdir={tmp_path}") == (130, "", "kangaroo: interrupted\n")

    def fail(*_args, **_kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(loop, "train", fail)
    with pytest.raises(ZeroDivisionError):
        run(capsys, *TRAIN, f"--workdir={tmp_path}")


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


INTERRUPTED = """
import atexit, os, sys, time, types
from importlib.machinery import ModuleSpec
from kangaroo_jax.cli import main as cli
from kangaroo_jax.cli.jobs import Job

class Compiling:
    def __del__(self):
        os._exit(139)

def compile():
    keeps = Compiling()
    print("compiles", flush=True)
    time.sleep(60)

def close():
    try:
        print("compiles", flush=True)
        time.sleep(60)
    finally:
        print("closes", flush=True)
        while True:
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                pass

def imports():
    try:
        print("compiles", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        raise ImportError("numpy._core.multiarray failed to import")

class Collected:
    def __del__(self):
        print("compiles", flush=True)
        time.sleep(60)

def prints():
    try:
        print("compiles", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())  # as PyErr_Print does
    print("goes on", flush=True)

def collects():
    Collected()
    print("goes on", flush=True)

def aborts():
    try:
        print("compiles", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        os.abort()  # as C++ does with an exception of Python

class InCpp:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name == "in_cpp" else None

    def create_module(self, spec):
        pass

    def exec_module(self, module):
        aborts()

def half_imported():
    sys.meta_path.insert(0, InCpp())
    import in_cpp

def ends():
    atexit.register(aborts)

for job in (compile, close, imports, prints, collects, half_imported, ends):
    cli.JOBS[job.__name__] = Job("")
    sys.modules[f"{cli.__package__}.{job.__name__}"] = types.SimpleNamespace(COMMANDS={"": job})
sys.exit(cli.start())
"""


@pytest.mark.parametrize(
    ("job", "lines"),
    [
        ("compile", ["compiles\n"]),
        ("close", ["compiles\n", "closes\n"]),
        ("imports", ["compiles\n"]),
        ("prints", ["compiles\n"]),
        ("collects", ["compiles\n"]),
        ("half_imported", ["compiles\n"]),
        ("ends", ["compiles\n"]),
    ],
)
def test_an_interruption_ends_a_process_that_compiles_and_the_second_one_that_closes(job, lines):
    """One that a library turns into an error of its own, or Python drops, or that C++ would meet, ends it as well."""
    command = [sys.executable, "-c", INTERRUPTED, job]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in lines:
            assert process.stdout.readline() == line
            process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=30)
    assert (process.returncode, out, error) == (130, "", "kangaroo: interrupted\n")


def test_an_interruption_before_the_command_can_answer_waits_until_it_can():
    """Also while the process begins anew for huge pages."""
    begin = (
        "from kangaroo_jax.__main__ import main; import os, signal, sys; first = 'GLIBC_TUNABLES' not in os.environ; "
    )
    press = "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}); first and os.kill(os.getpid(), signal.SIGINT); "
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", begin + press + "sys.exit(main())", "train"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "kangaroo: interrupted\n")


def test_no_slow_import_comes_before_an_interruption_waits():
    code = "import sys; before = {*sys.modules}; import kangaroo_jax.__main__; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert {*done.stdout.split()} == {"kangaroo_jax", "kangaroo_jax.__main__"}


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


def test_a_command_of_a_notebook_draws_without_the_notebooks_backend(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    assert cli.main(["--version"]) == 0
    assert os.environ["MPLBACKEND"] == "agg"
