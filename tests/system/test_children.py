"""Children of a command: Ctrl-C does not reach them, and none outlives its parent."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from kangaroo_jax.system import children

ROOT = Path(__file__).parents[2]
PARENT = """
import os, subprocess, sys, time
from kangaroo_jax.system import children

code = f"import time; from kangaroo_jax.system.children import end_with_parent as ends; ends({os.getpid()}); "
with children.uninterrupted():
    process = subprocess.Popen([sys.executable, "-c", code + "print('ready', flush=True); time.sleep(60)"])
print(process.pid, flush=True)
time.sleep(60)
"""


def test_an_interruption_of_the_group_leaves_a_child_that_starts_alone(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, **pipes, env=environment, start_new_session=True) as process:
        child = int(process.stdout.readline())
        masks = Path(f"/proc/{child}/status").read_text()
        blocked = int(masks.split("SigBlk:")[1].split()[0], 16)
        try:
            assert blocked >> signal.SIGINT - 1 & 1
            assert process.stdout.readline() == "ready\n"
            process.kill()
            assert process.communicate(timeout=30)[1] == ""  # its end of the pipe closed as the child ended
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_start_leaves_the_signal_as_it_was():
    with children.uninterrupted():
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
