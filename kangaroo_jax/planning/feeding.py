"""What a host must decode, so that its chips do not wait: frames a second, CPUs, bytes to each device.

Every host decodes the rows of which its devices hold a piece (`training.host_rows`), each medium in a thread of its
own; `sharding.arranged` gives a row to as few hosts as can be.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from kangaroo_jax.chips import Slices
from kangaroo_jax.config import StageConfig
from kangaroo_jax.data.batches.stream import batches_ahead
from kangaroo_jax.sharding import arranged, hosts_of_rows, mesh_sizes

# Frames of 480p H.264 that one CPU decodes in a second, by the slowest row of docs/data.md: 8 of a video of 20 minutes.
FRAMES_A_CPU = 15.0


@dataclasses.dataclass(frozen=True)
class Feeding:
    """What the neediest host decodes for a step, at a step's time."""

    hosts: int
    hosts_of_a_row: int  # that all decode it
    frames_a_second: float  # of a host, where every row is full of frames
    frames_a_second_a_chip: float
    cpus_needed: float
    cpus: int  # of a host; TPUs: as Cloud TPU has them, GPUs: as `launch/slurm/train.sh` asks
    threads_busy: int  # at most: media of the batches that are decoded at a time, and CPUs
    gb_a_second_to_a_device: float  # pixels as bytes of colours
    advice: str = ""  # where the chips would wait

    def __str__(self) -> str:
        again = f", each row by {self.hosts_of_a_row}" if self.hosts_of_a_row > 1 else ""
        line = (
            f"{self.frames_a_second:,.0f} frames a second on each of {self.hosts} hosts{again} "
            f"({self.frames_a_second_a_chip:.1f} a chip): {self.cpus_needed:.1f} of {self.cpus} CPUs at 480p, "
            f"{self.gb_a_second_to_a_device:.3f} GB/s to a device"
        )
        return f"{line}; THE CHIPS WOULD WAIT: {self.advice}" if self.advice else line


def feeding(
    config: StageConfig, target: Slices, devices: Sequence[Any], seconds: float, samples: float
) -> Feeding | None:
    """What a host must decode where a step takes `seconds`, None for a stage without frames.

    Args:
        config: a stage's config, resolved.
        target: the chips.
        devices: TPUs as `arranged` takes them; of GPUs none, each has a process of its own.
        seconds: of a step.
        samples: in a row, on average.
    """
    data = config.data
    if not data.frames_per_pack:
        return None
    groups = _groups(config, target, devices)
    rows = data.packs_per_batch // len(groups)
    decoded = collections.Counter(host for hosts in groups for host in hosts)
    most = rows * max(decoded.values())
    chips = target.devices / len(decoded)
    cpus = round(chips * target.chip.cpus)
    frames = most * data.frames_per_pack / seconds
    needed = frames / FRAMES_A_CPU
    row_bytes = data.frames_per_pack * data.image_size**2 * 3
    busy = max(1, min(cpus, math.floor(batches_ahead(cpus, most, row_bytes) * most * max(1.0, samples))))
    pixels = data.packs_per_batch * row_bytes / target.devices
    shared = max(map(len, groups))
    return Feeding(
        hosts=len(decoded),
        hosts_of_a_row=shared,
        frames_a_second=round(frames, 1),
        frames_a_second_a_chip=round(frames / chips, 2),
        cpus_needed=round(needed, 1),
        cpus=cpus,
        threads_busy=busy,
        gb_a_second_to_a_device=round(pixels / seconds / 1e9, 4),
        advice=_advice(needed, busy, cpus, shared),
    )


def _groups(config: StageConfig, target: Slices, devices: Sequence[Any]) -> list[set[int]]:
    """The hosts of each group of rows."""
    mesh = config.train.mesh
    if target.chip.platform == "tpu":
        return hosts_of_rows(arranged(mesh_sizes(mesh, target.devices), devices))
    size = mesh[2] * mesh[3]
    return [set(range(first, first + size)) for first in range(0, target.devices, size)]


def _advice(needed: float, busy: int, cpus: int, shared: int) -> str:
    """What to do where the CPUs that decode are too few, "" where they are enough."""
    if needed <= busy:
        return ""
    ways = []
    if shared > 1:
        ways.append(f"a mesh whose context and tensor axes give a row to fewer than {shared} hosts")
    if needed > cpus:
        ways.append("hosts with more CPUs, or more of them")
    else:
        ways.append(f"shorter samples, for no more than {busy} videos are decoded at a time")
    ways.append("videos of fewer pixels or with key frames near each other; config.data.cache_mib if all fit in memory")
    return " or ".join(ways)
