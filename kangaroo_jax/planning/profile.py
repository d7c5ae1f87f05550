"""Seconds of a step by part, as a profile has measured them: beside what was foretold.

A profile (`config.train.profile`, `kangaroo bench train --profile`, `jax.profiler`) names the operations that ran and
has the programs they are of. Each operation is put to the part that `planning/cycles.py` would put it to.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
from jaxlib import _hlo  # type: ignore[attr-defined]  # it has no types

from kangaroo_jax.chips import Chip
from kangaroo_jax.errors import UserError
from kangaroo_jax.planning import cycles, gpu, hlo, kernels

_METADATA = "/host:metadata"  # the plane that holds the programs
_OPERATIONS = "XLA Ops"  # of a TPU's lines, the one with what its core computes
_MODULES = "XLA Modules"
# Fields of tsl's xplane.proto and XLA's hlo.proto.
_PLANES, _PLANE_NAME, _EVENT_METADATA = 1, 2, 4
_VALUE, _EVENT_NAME, _STATS, _BYTES, _HLO_MODULE = 2, 2, 5, 6, 1


@dataclasses.dataclass(frozen=True)
class Measured:
    """A program of a profile, as a device ran it on average."""

    program: str
    runs: int
    parts: dict[str, float]  # seconds of a run by part, see `cycles.PARTS`

    @property
    def seconds(self) -> float:
        """The sum."""
        return sum(self.parts.values())


@dataclasses.dataclass(frozen=True)
class _Ran:
    """An operation of a device's line, with the time of those within it taken off."""

    device: tuple[str, int]
    run: int | None
    program: int | None
    name: str
    seconds: float


def measured(path: Path, chip: Chip) -> Measured:
    """The program of a profile that took most of the time. `path` is an .xplane.pb, or a folder that holds one.

    Raises UserError where there is none, or it has no programs or no operations of them.
    """
    file = _file(path)
    try:
        programs = dict(_programs(memoryview(file.read_bytes()), chip))
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    except (ValueError, IndexError, KeyError, RuntimeError) as error:
        raise UserError(f"{file}: not a profile ({error})") from None
    ran = [one for plane in planes for one in _ran(plane)]
    of_each = {key: [one for one in ran if _is_of(one, key, names)] for key, names in programs.items()}
    longest = max(of_each, key=lambda key: sum(one.seconds for one in of_each[key]), default=None)
    if longest is None or not of_each[longest]:
        raise UserError(f"{file}: a profile without operations of a program; it must be taken while steps run")
    names, mine = programs[longest], of_each[longest]
    devices = len({one.device for one in mine})
    runs = len({one.run for one in mine if one.run is not None}) or _modules_run(planes, longest[0], devices)
    parts: dict[str, float] = dict.fromkeys(cycles.PARTS, 0.0)
    for one in mine:
        parts[names[one.name]] += one.seconds / (devices * runs)
    return Measured(longest[0], runs, parts)


def compared(found: Measured, foretold: dict[str, float]) -> dict[str, str]:
    """Rows that say what was measured beside what was foretold, the largest part first."""
    told = sum(foretold.values())
    parts = sorted(found.parts, key=lambda part: -max(found.parts[part], foretold.get(part, 0.0)))
    lines = [
        f"{part.replace('_', ' ')} {_seconds(found.parts[part])}" + (f" / {_seconds(foretold[part])}" if told else "")
        for part in parts
        if found.parts[part] or foretold.get(part)
    ]
    return {
        "measured": f"{_seconds(found.seconds)} s on a device in a run of {found.program}, {found.runs} runs"
        + (f"; {found.seconds / told:.2f} of what was foretold" if told else ""),
        "measured / foretold, s" if told else "measured by part, s": ", ".join(lines),
    }


def _seconds(value: float) -> str:
    return f"{value:.4g}"


def _file(path: Path) -> Path:
    files = sorted(path.rglob("*.xplane.pb")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise UserError(f"{path}: no profile; give an .xplane.pb or the folder that config.train.profile made")
    return files[-1]


# ---------------------------------------------------------------------------- what ran


def _is_of(one: _Ran, program: tuple[str, int], names: dict[str, str]) -> bool:
    return one.name in names and one.program in (None, program[1])


def _ran(plane: "jax.profiler.ProfilePlane") -> Iterator[_Ran]:
    tpu = plane.name.startswith("/device:TPU")
    for line in plane.lines:
        if tpu and line.name != _OPERATIONS:
            continue
        begun = sorted(line.events, key=lambda event: (event.start_ns, -event.duration_ns))
        for event, within in zip(begun, _within([(event.start_ns, event.duration_ns) for event in begun]), strict=True):
            stats = dict(event.stats)
            name = stats.get("hlo_op") or (event.name.partition(" = ")[0].lstrip("%") if tpu else "")
            if name:
                device = (plane.name, int(stats.get("device_ordinal", 0)))
                seconds = max(0.0, event.duration_ns - within) / 1e9
                yield _Ran(device, stats.get("run_id"), stats.get("program_id"), str(name), seconds)


def _within(spans: list[tuple[float, float]]) -> list[float]:
    """What the spans directly within each of `spans` (start, length), which are in order, take."""
    taken, around = [0.0] * len(spans), list[int]()
    for index, (start, length) in enumerate(spans):
        while around and start >= sum(spans[around[-1]]):
            around.pop()
        if around:
            taken[around[-1]] += length
        around.append(index)
    return taken


def _modules_run(planes: list["jax.profiler.ProfilePlane"], program: str, devices: int) -> int:
    """How often a TPU ran a program, which its operations do not say."""
    lines = [line for plane in planes for line in plane.lines if line.name == _MODULES]
    runs = sum(str(event.name).startswith(program) for line in lines for event in line.events)
    return max(1, runs // devices)


# ---------------------------------------------------------------------------- the programs


def _programs(space: memoryview, chip: Chip) -> Iterator[tuple[tuple[str, int], dict[str, str]]]:
    """((name, id), the part of each operation by its name) of each program of a profile."""

    def attends(visit: hlo.Visit) -> bool:
        return kernels.call(visit) is not None or gpu.attention_flops(visit, chip) > 0

    for plane in _all(space, _PLANES):
        if bytes(_first(plane, _PLANE_NAME)) != _METADATA.encode():
            continue
        for entry in _all(plane, _EVENT_METADATA):
            event = _first(entry, _VALUE)
            for stat in _all(event, _STATS):
                if kept := _first(stat, _BYTES):
                    module = _hlo.HloModule.from_serialized_hlo_module_proto(bytes(_first(kept, _HLO_MODULE)))
                    name, _, number = bytes(_first(event, _EVENT_NAME)).decode().partition("(")
                    yield (name, int(number.rstrip(")") or 0)), cycles.parts_of(hlo.parse(module.to_string()), attends)


def _first(message: memoryview, number: int) -> memoryview:
    """The first field of a protocol buffer that has this number; empty where there is none."""
    return next(_all(message, number), memoryview(b""))


def _all(message: memoryview, number: int) -> Iterator[memoryview]:
    """The fields of a protocol buffer that have this number and are themselves bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            _, at = _varint(message, at)
            continue
        length, at = _varint(message, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
        if key == number << 3 | 2:
            yield message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """(a number of seven bits a byte, where it ends)."""
    value = shift = 0
    while message[at] & 128:
        value, shift, at = value | (message[at] & 127) << shift, shift + 7, at + 1
    return value | message[at] << shift, at + 1
