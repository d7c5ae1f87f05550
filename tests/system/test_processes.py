"""Processes that may be lost: what starts them, what is left of them, and what a lost one costs."""

import contextlib
import operator
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kangaroo_jax.system.processes import Lost, NoStart, WorkerPool

# As a person writes it: nothing stands under `if __name__ == "__main__":`.
SCRIPT = """
import operator, os, time
from kangaroo_jax.system.processes import WorkerPool
pool = WorkerPool(operator.call, 1, 60.0)
print(pool.submit(os.getpid).result(), flush=True)
pool.submit(time.sleep, 60).result()
"""


@pytest.fixture
def pool():
    pool = WorkerPool(operator.call, 1, 1.0)
    yield pool
    pool.close()


def test_a_lost_process_costs_its_own_job(pool):
    jobs = [(os.abort,), (time.sleep, 30), (os._exit, 3), (divmod, 7, 2), (np.arange, 1 << 20)]
    futures = [pool.submit(*job) for job in jobs]
    assert pool.submit(os.abort).cancel()  # no process has begun with it
    for future, reason in zip(
        futures, ("crashed .SIGABRT.", "took more than 1 s", "ended with exit code 3"), strict=False
    ):
        with pytest.raises(Lost, match=reason):
            future.result()
    assert futures[3].result() == (3, 1)
    np.testing.assert_array_equal(futures[4].result(), np.arange(1 << 20))
    left = pool.submit(time.sleep, 30)
    pool.close()
    assert left.cancelled()


def test_a_process_that_is_ended_while_it_is_idle_costs_no_job():
    pool = WorkerPool(operator.call, 1, 60.0)
    first = pool.submit(os.getpid).result()
    os.kill(first, signal.SIGKILL)
    process = Path(f"/proc/{first}")
    with contextlib.suppress(FileNotFoundError):  # the pool has seen it already
        while len(list(process.glob("task/*"))) > 1 or ") Z " not in (process / "stat").read_text():
            time.sleep(0.01)
    assert pool.submit(os.getpid).result() != first and pool.replaced == 1
    pool.close()


def test_processes_that_do_not_start_say_so_to_every_job(capfd):
    pool = WorkerPool(operator.call, 1, 1.0, prepare=os.abort)
    with pytest.raises(NoStart, match="ended as it started .crashed .SIGABRT"):
        pool.submit(os.getpid).result()
    with pytest.raises(NoStart):
        pool.submit(os.getpid).result()
    pool.close()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it ends with its job")
def test_a_script_of_any_form_starts_processes_that_end_with_it_in_the_midst_of_a_job(tmp_path):
    (tmp_path / "mine.py").write_text(SCRIPT)
    with subprocess.Popen([sys.executable, str(tmp_path / "mine.py")], stdout=subprocess.PIPE) as script:
        assert script.stdout
        pid = int(script.stdout.readline())
        assert not gone(pid)
        script.send_signal(signal.SIGKILL)
    end = time.monotonic() + 10
    while not gone(pid):
        assert time.monotonic() < end
        time.sleep(0.02)
