"""The host machine: its CPUs."""

import os


def usable_cpus() -> int:
    """How many CPUs this process may use: taskset, cpusets and Slurm leave it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
