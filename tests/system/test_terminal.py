"""What is printed: lines of text, whatever names stand in them, and to nobody where nobody reads any more."""

import io
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from kangaroo_jax.data.audit import check as data_check
from kangaroo_jax.data.media.addresses import short
from kangaroo_jax.errors import UserError, printable
from kangaroo_jax.system.processes import WorkerPool
from kangaroo_jax.system.terminal import Output, outputs, rewrite

ROOT = Path(__file__).parents[2]
HOSTILE = {
    "a\nBAD b": "a\\nBAD b",
    "a\r\x1b[2Kb": "a\\r\\x1b[2Kb",
    "\x1b]0;title\x07": "\\x1b]0;title\\x07",
    "\x9b31m\x7f\x00\t": "\\x9b31m\\x7f\\x00\\t",
    "gpj.\u202eexe\u2066": "gpj.\\u202eexe\\u2066",
    "a\u2028b\udcff": "a\\u2028b\\udcff",
}
HARMLESS = ("视频 🦘 é", "שלום\u200f", "👩\u200d👧", "a  b\\n")


@pytest.mark.parametrize("text", HOSTILE)
def test_a_name_is_one_line_that_steers_nothing(text):
    assert printable(text) == str(UserError(text)) == short(text) == HOSTILE[text]
    assert printable(HOSTILE[text]) == HOSTILE[text]


@pytest.mark.parametrize("text", HARMLESS)
def test_other_text_stays_as_it_is(text):
    stream = io.StringIO()
    print(text, file=Output(stream))  # type: ignore[arg-type]
    assert (printable(text), stream.getvalue()) == (text, f"{text}\n")


def test_the_bytes_of_an_address_are_left_out():
    assert short("data:video/mp4;base64,AAAA") == "data:video/mp4;base64,..."


def test_what_is_printed_keeps_its_lines_and_loses_its_escapes(capsys):
    with outputs():
        print("a\tb\r\nc\x1b[31m\r\u202ed\udcff")
        sys.stderr.writelines(["x\x07\n"])
        rewrite("50%\nof \x1b[31m")
    out, error = capsys.readouterr()
    assert (out, error) == ("a\tb\r\nc\\x1b[31m\\r\\u202ed\\udcff\n\r\x1b[K50%\\nof \\x1b[31m", "x\\x07\n")


class InThisProcess:
    """In place of a pool of processes, which take seconds to start."""

    def __init__(self, task: Callable[..., Any], *_: Any) -> None:
        self._task = task

    def submit(self, *arguments: Any) -> Future:
        future: Future = Future()
        future.set_result(self._task(*arguments))
        return future

    def close(self) -> None:
        pass


def test_a_path_of_lines_is_one_line_of_a_check(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data_check, "media_pool", InThisProcess)
    bad, report = str(tmp_path / "x\nBAD \x1b[31mgood.png"), tmp_path / "report.jsonl"
    Path(bad).write_bytes(b"no image")
    assert data_check.check_media({(bad, "image"): "0"}, report, workers=1, seconds=9) == 1
    first, *rest = capsys.readouterr().out.split("\n")
    assert first.startswith("BAD ") and "x\\nBAD \\x1b[31mgood.png" in first
    assert not any(line.startswith("BAD") for line in rest) and json.loads(report.read_text())["path"] == bad


CODE = """
import sys
from kangaroo_jax.system.terminal import outputs
with outputs():
    for i in range(5000):
        print("step", i)
    open(sys.argv[1], "w").write("saved")
"""


def test_a_job_goes_on_when_nobody_reads_any_more(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", CODE, tmp_path / "done"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout and process.stderr and process.stdout.readline() == b"step 0\n"
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(timeout=60) == 0
    assert (tmp_path / "done").read_text() == "saved"


def test_standard_output_may_be_closed_or_full(tmp_path):
    def help_to(redirection: str) -> tuple[int, str]:
        command = f"'{sys.executable}' -m kangaroo_jax --help {redirection}"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
        return done.returncode, done.stderr

    assert help_to(">&-") == (0, "")
    assert help_to(">&- 2>&-") == (0, "")
    if Path("/dev/full").exists():
        assert help_to("> /dev/full") == (2, "kangaroo: <stdout>: cannot be written (No space left on device)\n")


WARNED = """
import sys, warnings
from kangaroo_jax.cli import main

def job(words):
    for _ in range(2):
        warnings.warn("all samples\\nwere used")
        warnings.warn("all samples\\nwere used", RuntimeWarning)
        warnings.warn("to come", PendingDeprecationWarning)

main._run = job
main.main([])
warnings.warn("to come", PendingDeprecationWarning)
warnings.warn("after it")
"""


@pytest.mark.parametrize("flags", [[], ["-W", "default"]])
def test_a_warning_is_a_line_without_a_place_in_the_code(flags):
    ran = subprocess.run([sys.executable, *flags, "-c", WARNED], capture_output=True, text=True, cwd=ROOT, check=True)
    said, *rest = ran.stderr.splitlines()
    if flags:
        assert said.startswith("<string>:7: UserWarning") and "<string>:9: PendingDeprecationWarning" in ran.stderr
    else:
        assert said == "kangaroo: warning: all samples were used"
        assert rest == ["<string>:14: UserWarning: after it"]


def warn(text: str) -> None:
    """In a process of a pool."""
    warnings.warn(text, stacklevel=2)


def test_a_warning_of_a_process_is_such_a_line_too(capfd):
    pool = WorkerPool(warn, 1, 60)
    for _ in range(2):
        pool.submit("damaged\x1b[2J").result()
    pool.close()
    assert capfd.readouterr().err == "kangaroo: warning: damaged\\x1b[2J\n"
