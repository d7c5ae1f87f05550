"""`kangaroo JOB ...`: runs one of the table of jobs.

Bad input, a full disk and an unwritable path give one line on stderr and exit code 2; Ctrl-C gives exit code 130.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import NoReturn

from kangaroo_jax.cli.jobs import JOBS, commands_of
from kangaroo_jax.errors import one_line
from kangaroo_jax.system.terminal import outputs

HELP = ("--help", "-h", "-help")
USAGE = """usage: kangaroo JOB [--flag=value ...]
       kangaroo JOB --help

Kangaroo, a video-language model for long videos, in JAX.

jobs:
"""
# Errors that are due to the disk or path, not the program.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OF_THE_DISK = frozenset((*_FULL, errno.EROFS, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG))

_ENDING = threading.RLock()  # held by the thread that ends the process

# The extra of setup.py whose packages a room imports at its top.
_EXTRAS = {
    "conversion": "convert",
    "curation": "curation",
    "quickstart": "quickstart",
    "serving": "serve",
    "web": "web",
}


def start() -> int:
    """Run `main` as the command of this process; `__main__` defers Ctrl-C until `main` handles it."""
    job = JOBS.get(sys.argv[1]) if sys.argv[1:] else None
    if job is not None and job.huge_pages:
        from kangaroo_jax.system.memory import ensure_huge_pages

        ensure_huge_pages()
    code = main(interrupted=_end, pressed=_watch_interrupts())
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: _end())  # so that no exception interrupts libraries at exit
    return code


def _end() -> NoReturn:
    """End this process at once as interrupted, even during a write to stderr.

    A normal exit would free the interrupted frames, and objects of an XLA compilation in them crash the process then.
    """
    with _ENDING:  # and is not left: another thread that ends the process, too, says nothing and waits
        if sys.stderr is not None:
            with contextlib.suppress(OSError):
                os.write(2, b"kangaroo: interrupted\n")
        os._exit(130)


def _imports(frame: FrameType | None) -> bool:
    """Whether `frame` is part of an import."""
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


def _watch_interrupts() -> Callable[[], bool]:
    """Let a second Ctrl-C end the process at once; returns a function that says whether Ctrl-C was pressed.

    The first one is an exception that Python raises when a library's call returns, perhaps minutes later, and that
    closes open resources. A user who presses it again does not want to wait. If Python drops that exception (in a
    garbage collector's callback, in `__del__`) or C code prints it, the process ends, too, because the run would go
    on. It also ends if Ctrl-C comes during an import: C++ modules (jaxlib's, by nanobind) abort the process when a
    Python exception interrupts their import.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    pressed = False

    def raised(number: int, frame: FrameType | None) -> NoReturn:
        nonlocal pressed
        pressed = True
        if _imports(frame):
            _end()
        signal.default_int_handler(number, frame)

    def watch() -> None:
        interrupts = 0
        while interrupts < 2:
            interrupts += os.read(reader, 1) == bytes([signal.SIGINT])
        _end()

    def dropped(unraisable: "sys.UnraisableHookArgs") -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            _end()
        sys.__unraisablehook__(unraisable)

    def printed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            _end()
        sys.__excepthook__(kind, error, trace)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # unless it is ignored, as under nohup
        signal.signal(signal.SIGINT, raised)
    sys.unraisablehook, sys.excepthook = dropped, printed
    threading.Thread(target=watch, name="interrupts", daemon=True).start()
    return lambda: pressed


def main(
    argv: Sequence[str] | None = None,
    *,
    interrupted: Callable[[], object] | None = None,
    pressed: Callable[[], bool] = lambda: False,
) -> int:
    """Run the job that the arguments (by default those of the process) name; returns the exit code.

    `interrupted` is called after Ctrl-C, when open resources are closed; by default a line is printed. `pressed` says
    whether Ctrl-C was pressed: a library may raise another error instead of KeyboardInterrupt.
    """
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files; a notebook's backend, inherited, may not exist here
    with outputs():
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            _run(list(sys.argv[1:] if argv is None else argv))
        except KeyboardInterrupt:
            if interrupted is not None:
                interrupted()
            print("kangaroo: interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            if pressed() and interrupted is not None:
                interrupted()  # C code raises ImportError if its import is interrupted
            from kangaroo_jax.errors import UserError

            error = _no_devices(error) or _no_package(error) or error
            full = os.strerror(errno.ENOSPC)
            parts = [full] if full in str(error) and not isinstance(error, UserError) else []  # ValueError of Orbax
            if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
                parts = [str(part) for part in (error.filename, error.strerror) if part]
            if parts:
                error = UserError(": ".join(parts) + "; nothing finished is lost: repair that, and run the same again")
            if not isinstance(error, UserError):
                raise
            print(f"kangaroo: {error}", file=sys.stderr)
            return 2
    return 0


def _no_devices(error: BaseException | None) -> Exception | None:
    """The error to print if `error` is due to devices in JAX_PLATFORMS that JAX does not find."""
    from kangaroo_jax.errors import UserError

    platforms = os.environ.get("JAX_PLATFORMS")
    while error and not (isinstance(error, AssertionError) or "Unable to initialize backend" in str(error)):
        error = error.__cause__ or error.__context__
    if not error or not platforms or "jax" not in sys.modules:
        return None
    try:
        sys.modules["jax"].devices()
    except (RuntimeError, AssertionError) as why:  # AssertionError, without text, if the platform's plugin is missing
        text = one_line(why)[:300]
        found = f"JAX_PLATFORMS={platforms}: JAX finds no such devices here{text and f' ({text})'}"
        return UserError(f"{found}; install what drives them, or set JAX_PLATFORMS=cpu")
    return None


def _no_package(error: BaseException) -> Exception | None:
    """The error to print if `error` is due to a package that an extra brings."""
    from kangaroo_jax.errors import UserError
    from kangaroo_jax.system.installing import install_line

    if not isinstance(error, ModuleNotFoundError) or not error.name or error.name.startswith("kangaroo_jax"):
        return None
    modules = [str(frame.f_globals.get("__name__")).split(".") for frame, _ in traceback.walk_tb(error.__traceback__)]
    rooms = [names[1] for names in modules if names[0] == "kangaroo_jax" and len(names) > 1]
    extra = _EXTRAS.get(rooms[-1]) if rooms else None
    how = install_line(extra) if extra else "kangaroo doctor says which extra brings it"
    return UserError(f"the package {error.name.partition('.')[0]} is missing: {how}")


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in (*HELP, "help"):
        print(USAGE + "".join(f"  {name:12}{job.summary}\n" for name, job in JOBS.items()), end="")
    elif arguments[0] == "--version":
        from kangaroo_jax import __version__

        print(f"kangaroo {__version__}")
    else:
        _run_job(arguments[0], arguments[1:])


def _run_job(name: str, words: list[str]) -> None:
    if name not in JOBS:
        from kangaroo_jax.config_files import nearest
        from kangaroo_jax.errors import UserError

        raise UserError(f"no job {name!r}{nearest(name, JOBS)}: kangaroo --help lists them")

    from kangaroo_jax.cli import arguments, helping

    commands = commands_of(name)
    if not set(words).isdisjoint(HELP):
        print(helping.help_text(name, JOBS[name].summary, commands, words), end="")
        return
    arguments.bind(*arguments.choose(name, commands, words)).run()
