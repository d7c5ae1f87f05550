"""What a host must decode, so that its chips do not wait: frames a second, CPUs, bytes to each device.

Every host decodes the frames that its devices hold (`training.host_rows`), of each medium in a thread of its own;
`sharding.arranged` gives a row to as few hosts as can be.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from kangaroo_jax.chips import Slices
from kangaroo_jax.config import StageConfig
from kangaroo_jax.data.batches.stream import batches_ahead
from kangaroo_jax.sharding import arranged, frames_cut, groups_of_rows, mesh_sizes

# Frames of 480p H.264 that one CPU decodes in a second, by the slowest row of docs/data.md: 8 of a video of 20 minutes.
FRAMES_A_CPU = 15.0


@dataclasses.dataclass(frozen=True)
class Feeding:
    """What the neediest host decodes for a step, at a step's time."""

    hosts: int
    hosts_of_a_row: int  # each of which decodes a part of it
    frames_a_second: float  # of a host, where every row is full of frames
    frames_a_second_a_chip: float
    cpus_needed: float
    frames_a_cpu: float  # a second
    cpus: int  # of a host; TPUs: as Cloud TPU has them, GPUs: as `launch/slurm/train.sh` asks
    threads_busy: int  # at most: media of the batches that are decoded at a time, and CPUs
    gb_a_second_to_a_device: float  # pixels as bytes of colours
    advice: str = ""  # where the chips would wait

    def __str__(self) -> str:
        again = f", each row by {self.hosts_of_a_row} together" if self.hosts_of_a_row > 1 else ""
        line = (
            f"{self.frames_a_second:,.0f} frames a second on each of {self.hosts} hosts{again} "
            f"({self.frames_a_second_a_chip:.1f} a chip): {self.cpus_needed:.1f} of {self.cpus} CPUs at "
            f"{self.frames_a_cpu:g} frames a second, "
            f"{self.gb_a_second_to_a_device:.3f} GB/s to a device"
        )
        return f"{line}; THE CHIPS WOULD WAIT: {self.advice}" if self.advice else line


def feeding(
    config: StageConfig,
    target: Slices,
    devices: Sequence[Any],
    seconds: float,
    samples: float,
    frames_a_cpu: float = FRAMES_A_CPU,
) -> Feeding | None:
    """What a host must decode where a step takes `seconds`, None for a stage without frames.

    Args:
        config: a stage's config, resolved.
        target: the chips.
        devices: TPUs as `arranged` takes them; of GPUs none, each has a process of its own.
        seconds: of a step.
        samples: in a row, on average.
        frames_a_cpu: frames that a CPU decodes in a second; `kangaroo bench batches` measures them on one's own data.
    """
    data = config.data
    if not data.frames_per_pack:
        return None
    groups = _groups(config, target, devices)
    rows = data.packs_per_batch // len(groups)
    held: collections.Counter[int] = collections.Counter()  # frames of a batch, by host
    share, shared = 0, max(map(len, groups))
    for group in groups:
        for host, frames in group.items():
            held[host] += rows * frames
            share = max(share, frames)
    neediest, most = max(held.items(), key=lambda item: item[1])
    mine = rows * sum(neediest in group for group in groups)
    chips = target.devices / len(held)
    cpus = round(chips * target.chip.cpus)
    needed = most / seconds / frames_a_cpu
    frame_bytes = data.image_size**2 * 3
    media = max(1.0, samples * share / data.frames_per_pack)  # of a row, that this host has a part of
    busy = max(1, min(cpus, math.floor(batches_ahead(cpus, mine, share * frame_bytes) * mine * media)))
    pixels = data.packs_per_batch * data.frames_per_pack * frame_bytes / target.devices
    return Feeding(
        hosts=len(held),
        hosts_of_a_row=shared,
        frames_a_second=round(most / seconds, 1),
        frames_a_second_a_chip=round(most / seconds / chips, 2),
        cpus_needed=round(needed, 1),
        frames_a_cpu=frames_a_cpu,
        cpus=cpus,
        threads_busy=busy,
        gb_a_second_to_a_device=round(pixels / seconds / 1e9, 4),
        advice=_advice(needed, busy, cpus),
    )


def _groups(config: StageConfig, target: Slices, devices: Sequence[Any]) -> list[dict[int, int]]:
    """For each group of rows the hosts that have it, and how many of a row's frames each of them holds."""
    sizes, data = mesh_sizes(config.train.mesh, target.devices), config.data
    pieces = frames_cut(sizes, data.packs_per_batch, data.frames_per_pack)
    if target.chip.platform == "tpu":
        hosts = [[device.process_index for device in group.flat] for group in groups_of_rows(arranged(sizes, devices))]
    else:
        size = sizes[2] * sizes[3]
        hosts = [list(range(first, first + size)) for first in range(0, target.devices, size)]
    found = []
    for group in hosts:
        held: dict[int, set[int]] = collections.defaultdict(set)
        for place, host in enumerate(group):
            held[host].add(place * pieces // len(group))
        found.append({host: len(mine) * data.frames_per_pack // pieces for host, mine in held.items()})
    return found


def _advice(needed: float, busy: int, cpus: int) -> str:
    """What to do where the CPUs that decode are too few, "" where they are enough."""
    if needed <= busy:
        return ""
    ways = []
    if needed > cpus:
        ways.append("hosts with more CPUs, or more of them")
    else:
        ways.append(f"shorter samples, for no more than {busy} videos are decoded at a time")
    ways.append("videos of fewer pixels or with key frames near each other; config.data.cache_mib if all fit in memory")
    return " or ".join(ways)
