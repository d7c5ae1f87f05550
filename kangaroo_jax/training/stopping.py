"""Ends runs safely: signals, the lock of the folder, closed output, a full disk."""

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from kangaroo_jax.errors import UserError
from kangaroo_jax.system.progress import Tell
from kangaroo_jax.training.distributed import Preempted, is_main

INTERRUPTED = 130  # exit code of Ctrl-C; launch scripts do not restart such a run


class Preemption:
    """Listens for requests to end this run.

    After SIGTERM (sent by clouds and Slurm before they take a machine), SIGHUP (a closed terminal) or Ctrl-C the run
    saves and ends. A second Ctrl-C, or one before the first finished step, ends it at once: there is nothing to save
    then, and while JAX compiles only a thread can act. Before the first step begins, the other signals end it at
    once, too. Signals that this process was started to ignore (nohup) are ignored.
    """

    _last_asked = 0  # JAX compares step numbers, which must keep growing if a process runs several stages

    def __init__(self, tell: Tell = print) -> None:
        """Start listening, in the main thread. With several processes JAX chooses the step after which all stop."""
        self._asked, self._told, self._interrupts = "", False, 0
        self._stepping = self._done = self._agreed = False
        self._steps_before = Preemption._last_asked
        self._many = jax.process_count() > 1
        self._tell = tell
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._wakeup = -1
        if threading.current_thread() is not threading.main_thread():
            return
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._pipe = (read, write)
        # Python runs handlers only between bytecodes of the main thread, which may compile for minutes. It writes the
        # signal's number into this pipe at once.
        self._wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True)
        self._listener.start()
        # With several processes JAX itself handles SIGTERM, and stops all of them after the same step.
        for number in (signal.SIGINT, signal.SIGHUP, *(() if self._many else (signal.SIGTERM,))):
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._ask)

    def _listen(self, pipe: int) -> None:
        while True:
            with contextlib.suppress(OSError):
                for number in os.read(pipe, 64):
                    if number == 0:  # written by `close`
                        os.close(pipe)
                        return
                    if number in self._before:
                        self._note(signal.Signals(number))

    def _ask(self, number: int, *_: Any) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        self._asked = self._asked or name

    def _note(self, number: signal.Signals) -> None:
        interrupt = number == signal.SIGINT
        self._interrupts += interrupt
        if (self._interrupts > 1 or not self._done) if interrupt else not self._stepping:
            with contextlib.suppress(OSError):
                by = "" if interrupt else f" by {number.name}"
                print(f"kangaroo: interrupted{by}", file=sys.stderr, flush=True)
            os._exit(128 + number)
        self._ask(number)
        if not self._told:
            self._told = True
            again = "; Ctrl-C again ends at once, without saving" if interrupt else ""
            self._tell(f"{self._asked}: saving after the steps that are under way{again}")
            if self._many:
                os.kill(os.getpid(), signal.SIGTERM)

    def stepping(self) -> None:
        """The first step begins: from now on signals wait for it, so that the preparation is not lost."""
        self._stepping = True

    def done(self) -> None:
        """A step is finished: from now on there is something to save."""
        self._done = True

    def reached(self, step: int) -> bool:
        """Whether to save and stop before `step` begins; once true, it stays true.

        Every process must call this before every step, and once more after the last one.
        """
        if not self._many:
            return bool(self._asked)
        from jax.experimental import multihost_utils

        Preemption._last_asked = self._steps_before + step
        self._agreed = self._agreed or multihost_utils.reached_preemption_sync_point(Preemption._last_asked)
        return self._agreed

    def saved(self) -> Preempted:
        """The exception to raise once the state is saved."""
        return Preempted(INTERRUPTED if self._asked == "Ctrl-C" else 0)

    def close(self) -> None:
        """Stop listening, after the signals that have come so far are handled."""
        if self._pipe is None:
            return
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        os.write(self._pipe[1], b"\0")
        self._listener.join()
        os.close(self._pipe[1])
        self._pipe = None
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}


@contextlib.contextmanager
def locked(workdir: Path, tell: Tell) -> Iterator[None]:
    """Keep other runs out of `workdir`. The main process holds the lock, which is released when it ends in any way.

    Raises UserError if another run is in the folder.
    """
    if not is_main():
        yield
        return
    path = workdir / "lock"
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                tell(
                    f"{path}: this file system has no locks ({error.strerror}): check that no other run uses the folder"
                )
            else:
                file.seek(0)
                who = file.read().strip()
                raise UserError(
                    f"{workdir}: another run is in this folder{f' ({who})' if who else ''}; wait for it or stop it, or "
                    "give another --workdir"
                ) from None
        file.seek(0)
        file.truncate()
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid()}) + "\n")
        file.flush()
        yield


def unbroken(tell: Tell) -> Tell:
    """`tell` that becomes silent once its output is closed (a pipe or terminal), so that the run goes on."""
    heard = True

    def told(line: str) -> None:
        nonlocal heard
        if heard:
            try:
                tell(line)
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.EIO):
                    raise
                heard = False
                with contextlib.suppress(OSError, ValueError):  # so that flushing the buffer does not fail at exit
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return told


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def explained_disk(workdir: Path) -> Iterator[None]:
    """Turn failures inside because of a full or unwritable disk into one line. Raises UserError.

    Orbax's threads also log their exceptions with tracebacks; these are suppressed, as the raised error says it once.
    Pending writes of tensorstore report to an event loop that the failed save has closed, which would print errors
    until the process ends; these are suppressed, too.
    """
    log, printed = logging.getLogger("absl"), sys.unraisablehook
    log.addFilter(_no_traceback)
    sys.unraisablehook = functools.partial(_unless_too_late, printed)
    full = False
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = _disk_errno(error, workdir)
        full = number in _FULL
        if number in _FULL:
            line = f"{workdir}: the disk is full ({os.strerror(number)}); make room"
        elif number in (errno.EROFS, errno.EACCES, errno.EPERM):
            line = f"{workdir}: cannot be written ({os.strerror(number)}); repair that, or give another --workdir"
        else:
            raise
        steps = [int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()]
        whole = f"the last whole checkpoint is that of step {max(steps)}" if steps else "no step was saved yet"
        raise UserError(f"{line}, and run again to go on: {whole}") from None
    finally:
        log.removeFilter(_no_traceback)
        if not full:
            sys.unraisablehook = printed


def _unless_too_late(printed: Callable[[Any], object], dropped: "sys.UnraisableHookArgs") -> None:
    """Print an error that Python drops, unless it is about a closed event loop."""
    if not (isinstance(dropped.exc_value, RuntimeError) and str(dropped.exc_value) == "Event loop is closed"):
        printed(dropped)


def _no_traceback(record: logging.LogRecord) -> bool:
    """Whether `record` is not about an exception."""
    return not record.exc_info


def _disk_errno(error: BaseException | None, workdir: Path) -> int:
    """The system's error number behind `error`, which libraries wrap in their own texts; 0 if there is none.

    An error about a file outside of `workdir` does not count.
    """
    seen = 0
    while error is not None and seen < 20:
        if isinstance(error, OSError) and error.errno:
            inside = error.filename is None or str(workdir) in str(error.filename)
            return error.errno if inside else 0
        for number in (*_FULL, errno.EROFS, errno.EACCES):
            if os.strerror(number) in str(error):
                return number
        error, seen = error.__cause__ or error.__context__, seen + 1
    return 0
