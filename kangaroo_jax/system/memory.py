"""The host machine: memory settings that make steps on a CPU faster, what a process has held and what it may hold."""

import contextlib
import ctypes
import dataclasses
import os
import resource
import sys
from pathlib import Path

_HUGE_PAGES = "glibc.malloc.hugetlb"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h of glibc


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next allocation instead of giving it back to the kernel.

    XLA on a CPU allocates one buffer of all temporaries a step and frees it after. By default that is a
    fresh mapping each time, whose every page faults: a third of the CPU time of a tiny step. Call it
    once, before the first step; there is nothing to gain on an accelerator. Returns whether it took
    effect (False where the C library is not glibc).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # One arena, because the others are limited to 64 MiB a heap and map what is larger.
    return all(
        [mallopt(_M_ARENA_MAX, 1), mallopt(_M_MMAP_THRESHOLD, 1 << 30), mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)]
    )


def ensure_huge_pages() -> None:
    """Start this process anew, under its own number, with malloc asking the kernel for huge pages.

    Only the start of the C library can be told so, and what `keep_freed_memory` says comes late for buffers of threads
    that have an arena already: 20,000 page faults remain in a tiny step, a tenth of its time. Does nothing where
    GLIBC_TUNABLES has the setting already (`glibc.malloc.hugetlb=0` keeps things as they are) or outside Linux.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform.startswith("linux") and _HUGE_PAGES not in tunables:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{_HUGE_PAGES}=1")))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def host_memory() -> tuple[int, int]:
    """(bytes of memory that this process may use, those of them that are free), of the host or of its container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        free = next((int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:")), free)
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", where a container has no limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text("ascii")) for name in ("max", "current"))
        total, free = min(total, limit), min(free, limit - used)
    return total, free


def peak_mib(pid: int | str = "self") -> float:
    """The most resident memory that a process has had, in MiB; 0 where it has ended or the system does not say.

    `ru_maxrss` also counts what its parent held when it was started.
    """
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


@dataclasses.dataclass(frozen=True)
class Bounded:
    """What a process may take. Each such process imports this file, which therefore imports no JAX."""

    memory: int  # bytes beyond what it begins with; 0: no bound

    def begin(self) -> None:
        """Bound this process."""
        if self.memory:
            pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
            most = pages * resource.getpagesize() + self.memory
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
