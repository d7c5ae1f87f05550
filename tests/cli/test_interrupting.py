"""Ctrl-C: one line and exit code 130, whatever was going on."""

import os
import signal
import subprocess
import sys

import pytest

from kangaroo_jax.training import loop
from tests.cli.running import ROOT, TRAIN, run


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


INTERRUPTED = """
import atexit, os, sys, time, types
from importlib.machinery import ModuleSpec
from kangaroo_jax.cli import main as cli
from kangaroo_jax.cli.jobs import Job

def wait():
    print("compiles", flush=True)
    time.sleep(60)

class Compiling:
    def __del__(self):
        os._exit(139)

def compile():
    keeps = Compiling()
    wait()

def close():
    try:
        wait()
    finally:
        print("closes", flush=True)
        while True:
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                pass

def imports():
    try:
        wait()
    except KeyboardInterrupt:
        raise ImportError("numpy._core.multiarray failed to import")

class Collected:
    def __del__(self):
        wait()

def prints():
    try:
        wait()
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())  # as PyErr_Print does
    print("goes on", flush=True)

def collects():
    Collected()
    print("goes on", flush=True)

def aborts():
    try:
        wait()
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
