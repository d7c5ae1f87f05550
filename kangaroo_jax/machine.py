"""The machine and the versions that a job runs with: printed by `kangaroo info`, kept beside the results of a run."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kangaroo_jax
from kangaroo_jax.chips import find_chip
from kangaroo_jax.system.cpus import usable_cpus
from kangaroo_jax.system.memory import host_memory

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "av", "numpy"),
    *("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch", "transformers"),
)
# Variables that change what is computed or where, without secrets in their values.
VARIABLES = ("JAX_PLATFORMS", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "CUDA_VISIBLE_DEVICES", "GLIBC_TUNABLES")


def facts() -> dict[str, Any]:
    """What a reader of a run's figures asks first; JSON-able. Starts JAX.

    Keys: `kangaroo` and `commit` (with "+" where files differ from it; "" outside a clone), `python`, `system`,
    `packages` (name to version, of PACKAGES those that are installed), `ffmpeg`, `devices` (kind to number), `chip`
    (as `kangaroo plan` names it, "" for others), `device_gib` (of one device, where it says), `processes` of the run,
    `processor`, `cpus` that this process may use, `memory_gib` and `free_memory_gib` of the host or its container,
    `free_disk_gib` of the working folder, and `variables`.
    """
    import av
    import jax

    devices = jax.devices()
    memory, free = host_memory()
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    chip = find_chip(devices[0].device_kind)
    return {
        "kangaroo": kangaroo_jax.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := installed(name))},
        "ffmpeg": av.ffmpeg_version_info,
        "devices": dict(Counter(device.device_kind for device in devices)),
        "chip": chip.name if chip else "",
        "device_gib": round(limit / 2**30, 2),
        "processes": jax.process_count(),
        "processor": processor(),
        "cpus": usable_cpus(),
        "memory_gib": round(memory / 2**30, 1),
        "free_memory_gib": round(free / 2**30, 1),
        "free_disk_gib": round(shutil.disk_usage(".").free / 2**30, 1),
        "variables": {name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
    }


def described(found: dict[str, Any]) -> Iterator[str]:
    """Lines of `facts` for a terminal."""
    at = f" at {found['commit']}" if found["commit"] else ""
    yield f"{'kangaroo':10}{found['kangaroo']}{at}"
    yield f"{'python':10}{found['python']} on {found['system']}"
    yield f"{'packages':10}" + ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    yield f"{'FFmpeg':10}{found['ffmpeg']}"
    named = f" ({found['chip']})" if found["chip"] else ""
    each = f", {found['device_gib']} GiB each" if found["device_gib"] else ""
    devices = ", ".join(f"{number} x {kind}" for kind, number in found["devices"].items())
    processes = f", {found['processes']} processes" if found["processes"] > 1 else ""
    yield f"{'devices':10}{devices}{named}{each}{processes}"
    yield f"{'host':10}{found['cpus']} CPUs ({found['processor']})"
    yield f"{'memory':10}{found['memory_gib']} GiB, {found['free_memory_gib']} free"
    yield f"{'disk':10}{found['free_disk_gib']} GiB free here"
    for name, value in found["variables"].items():
        yield f"{name}={value}"


def installed(distribution: str) -> str:
    """The version of a distribution, "" where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit of the clone that this package stands in, with "+" where its files differ; "" outside a clone."""
    clone = Path(__file__).resolve().parents[1]
    if not (clone / "setup.py").is_file() or not (clone / ".git").exists():
        return ""

    def git(*words: str) -> str:
        line = ["git", "-C", str(clone), *words]
        return subprocess.run(line, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""  # no git here, or a clone of another user


def processor() -> str:
    """The name of the host's processor."""
    if sys.platform.startswith("linux"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
