"""Runs the self-tests, and says of each extra what is installed of it and what is missing."""

import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from packaging.requirements import Requirement

from kangaroo_jax.config_files import nearest
from kangaroo_jax.doctor.checks import CHECKS, Check
from kangaroo_jax.errors import UserError, printable
from kangaroo_jax.machine import installed
from kangaroo_jax.system.cpus import usable_cpus
from kangaroo_jax.system.installing import DISTRIBUTION, install_line
from kangaroo_jax.system.progress import Tell

LONGEST = 300  # seconds that a self-test may take before it is ended
_MARKS = {True: "ok", False: "NO", None: "--"}
HIDDEN = ("dev",)  # extras that a user does not look for


def examine(extras: Sequence[str] | None = None, tell: Tell = print) -> bool:
    """Print whether what is installed works; returns whether everything does.

    Args:
        extras: those whose self-tests and packages are looked at, "" for what every installation has; None for all.
        tell: prints a line.
    """
    begin = time.perf_counter()
    good = True
    for extra, missing in requirements(extras):
        wrong = not extra and missing
        good &= not wrong
        name = f"[{extra}]" if extra else "packages"
        if missing:
            advice = install_line(*([extra] if extra else []))
            tell(f"{'NO' if wrong else '--':4}{name:13}without {', '.join(missing)}: {advice}")
        else:
            tell(f"ok  {name:13}all that it asks for is here")
    chosen = {name: check for name, check in CHECKS.items() if extras is None or check.extra in extras}
    runs = {name: check for name, check in chosen.items() if all(map(installed, check.packages))}
    with ThreadPoolExecutor(max(1, usable_cpus())) as pool:
        longest_first = sorted(runs, key=lambda name: name != "training")
        found = {name: pool.submit(outcome, name) for name in longest_first}
        for name, check in chosen.items():
            works, line = found[name].result() if name in found else (None, _needs(check))
            good &= works is not False
            tell(f"{_MARKS[works]:4}{name:13}{line}")
    tell(f"{'what is installed works' if good else 'something is wrong'}; {time.perf_counter() - begin:.0f} s")
    return good


def check_extras(names: Sequence[str]) -> Sequence[str]:
    """`names`, all of which are extras of this package. Raises UserError."""
    known = [extra for extra, _ in requirements() if extra]
    for name in names:
        if name not in known:
            raise UserError(f"doctor: no extra {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return names


def requirements(extras: Sequence[str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """The requirements that this environment does not meet, of the package itself ("") and of each extra."""
    try:
        about = importlib.metadata.metadata(DISTRIBUTION)
        declared = [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or ()]
    except importlib.metadata.PackageNotFoundError:  # a bare copy of the package
        return
    known = ["", *(extra for extra in about.get_all("Provides-Extra") or () if extra not in HIDDEN)]
    core = [wanted for wanted in declared if _holds(wanted, "")]
    for extra in known if extras is None else [extra for extra in known if extra in extras]:
        own = [wanted for wanted in declared if _holds(wanted, extra) and wanted not in core] if extra else core
        yield extra, [line for wanted in own for line in _unmet(wanted)]


def _holds(wanted: Requirement, extra: str) -> bool:
    return wanted.marker is None or wanted.marker.evaluate({"extra": extra})


def _unmet(wanted: Requirement) -> Iterator[str]:
    """The requirement, where it is not met, or what its extras (`jax[tpu]`) ask for and is not here."""
    version = installed(wanted.name)
    if not version or not wanted.specifier.contains(version, prereleases=True):
        yield str(wanted).partition(";")[0].strip()
        return
    asked = map(Requirement, importlib.metadata.requires(wanted.name) or () if wanted.extras else ())
    for further in asked:
        if further.marker and not _holds(further, "") and any(_holds(further, extra) for extra in wanted.extras):
            yield from _unmet(further)


def _needs(check: Check) -> str:
    lacking = [name for name in check.packages if not installed(name)]
    return f"not tried: {', '.join(lacking)} not installed"


def outcome(name: str) -> tuple[bool, str]:
    """Whether a self-test passes in a process of its own, and what it says."""
    line = [sys.executable, "-m", "kangaroo_jax.doctor.checks", name]
    quiet = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    begin = time.perf_counter()
    try:
        ended = subprocess.run(line, capture_output=True, text=True, errors="replace", timeout=LONGEST, env=quiet)
    except subprocess.TimeoutExpired:
        return False, f"was not done after {LONGEST} s"
    lines = (ended.stdout if ended.returncode == 0 else ended.stderr).strip().splitlines()
    said = printable(lines[-1]) if lines else "said nothing"
    if ended.returncode < 0:
        said = f"the process ended by signal {-ended.returncode}; {said}"
    return ended.returncode == 0, f"{said} ({time.perf_counter() - begin:.1f} s)"
