"""What `--help` lists: jobs, flags, and a first command that can be run."""

import shlex

import pytest

from kangaroo_jax.cli import arguments
from kangaroo_jax.cli import main as cli
from kangaroo_jax.cli.chat import chat
from kangaroo_jax.cli.data import check
from kangaroo_jax.cli.jobs import JOBS, commands_of
from kangaroo_jax.cli.train import train
from tests.cli.running import ROOT, run

NO_BENCHES = {"answering", "__init__", "faulty_server", "torch_kangaroo", "health", "load"}


def test_help_lists_every_job(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(job.summary in out for job in cli.JOBS.values())


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
