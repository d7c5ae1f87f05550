"""Seconds of a step, foretold from the compiled program: the compiler's own estimates, part by part.

Optimised TPU programs say how many cycles each scheduled operation is estimated to take. Those are summed, times
the loops around. Attention kernels, of which the compiler knows nothing, take what their own schedules say
(`planning/kernels.py`). Collectives have no estimate either: bytes over links, in full where the program waits for
them, and where they go on beside computations what these do not cover.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Callable

from kangaroo_jax.chips import Chip, Slices
from kangaroo_jax.planning import hlo, kernels

PARTS = (
    "llm_products",
    "llm_attention",
    "llm_elementwise",
    "vision_products",
    "vision_attention",
    "vision_elementwise",
    "head_and_optimizer",
    "collectives_in_line",
    "collectives_waited_for",
)
REACHED = 0.9  # of a link's nominal speed
DCN_GB = 6.25  # GB/s of a chip to other slices: 200 Gbit/s of a host, over its four chips

_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_MODULES = ("vision", "llm")


@dataclasses.dataclass
class Times:
    """Seconds by part."""

    parts: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))

    def add(self, other: "Times", times: float = 1.0) -> None:
        """Add so many times what another takes."""
        for part, seconds in other.parts.items():
            self.parts[part] += seconds * times

    @property
    def seconds(self) -> float:
        """The sum."""
        return sum(self.parts.values())


def foretell(program: hlo.Module, target: Slices, unknown_trips: int = 1, visited: float = 1.0) -> dict[str, float]:
    """Seconds by part (PARTS) of a program for TPUs, none for a chip whose clock is not known.

    `unknown_trips` is assumed for loops whose trip count is only known at run time; `visited` is the share of the
    causal blocks of attention that kernels visit.
    """
    if target.chip.name not in kernels.CLOCK_GHZ:
        return {}
    found = _Timer(program, target, unknown_trips, visited).run(program.entry).parts
    return {part: found[part] for part in PARTS}


class _Timer:
    """Sums the time of computations, each once."""

    def __init__(self, program: hlo.Module, target: Slices, unknown_trips: int, visited: float) -> None:
        self._computations, self._unknown, self._visited = program.computations, unknown_trips, visited
        self._chip, self._target = target.chip, target
        self._hertz = kernels.CLOCK_GHZ[target.chip.name] * 1e9
        self._started = hlo.identities_started(program)
        self._known: dict[str, Times] = {}

    def run(self, name: str) -> Times:
        """The time of one run of a computation."""
        if name not in self._known:
            self._known[name] = self._timed(self._computations[name])
        return self._known[name]

    def _timed(self, computation: hlo.Computation) -> Times:
        """Operations one after another; collectives under way share the links, one after another as well."""
        total, module = Times(), _module_of(computation)
        now = links_free = 0.0
        arrives: dict[str, list[float]] = defaultdict(
            list
        )  # when collectives under way are complete, first begun first
        for operation in computation.values():
            begun = self._begun(operation)
            if begun is not None:
                key, seconds = begun
                links_free = max(now, links_free) + seconds
                arrives[key].append(links_free)
            known = arrives[self._ended(operation)]
            ended = known.pop(0) if known else now
            waited = max(0.0, ended - now)
            spent = self._spent(operation, computation, module)
            spent.parts["collectives_waited_for"] += waited
            total.add(spent)
            now += spent.seconds
        return total

    def _begun(self, operation: hlo.Operation) -> tuple[str, float] | None:
        """(key, seconds on the links) of a collective that goes on beside what comes next."""
        if operation.kind == "fusion":
            for inner in self._inner(operation):
                found = [one for one in inner.values() if hlo.collective(one)]
                if found and hlo.starts(inner):
                    return hlo.identity(found[0]), sum(self._on_links(one) for one in found)
        elif operation.kind in ("async-start", "call-start"):
            seconds = sum(self._on_links(one) for inner in self._inner(operation) for one in inner.values())
            return operation.name, seconds
        elif operation.kind.endswith("-start") and hlo.collective(operation):
            return operation.name, self._on_links(operation)
        return None

    def _ended(self, operation: hlo.Operation) -> str:
        """The key of the collective that an operation waits for, "" for none."""
        if operation.kind == "fusion":
            for inner in self._inner(operation):
                if hlo.ends(inner):
                    return next((hlo.identity(one) for one in inner.values() if hlo.collective(one)), "")
        elif operation.kind.endswith("-done") and operation.operands:
            return operation.operands[0]
        return ""

    def _spent(self, operation: hlo.Operation, computation: hlo.Computation, module: str) -> Times:
        """The time of an operation, without waiting for others."""
        times, kind = Times(), operation.kind
        if kind == "while":
            body = (operation.attribute("body") or "").lstrip("%")
            trips = hlo.trip_count(self._computations, computation, operation)
            times.add(self.run(body), self._unknown if trips is None else trips)
        elif kind == "call":
            for name in self._names(operation):
                times.add(self.run(name))
        elif kind == "conditional":
            branches = [self.run(name) for name in self._names(operation)]
            times.add(max(branches, key=lambda branch: branch.seconds, default=Times()))
        elif hlo.collective(operation):
            if not kind.endswith("-start"):
                times.parts["collectives_in_line"] += self._on_links(operation)
        elif call := kernels.call(hlo.Visit(operation, 1.0, computation)):
            times.parts[f"{_module(operation) or module}_attention"] += call.seconds(self._chip, self._visited)
        else:
            self._estimated(times, operation, computation, module)
        return times

    def _estimated(self, times: Times, operation: hlo.Operation, computation: hlo.Computation, module: str) -> None:
        """Add an operation by its estimate, and the collectives that it makes on the way."""
        found = _ESTIMATE.search(operation.text)
        seconds = int(found.group(1)) / self._hertz if found else 0.0
        multiplies = hlo.matmul_flops(hlo.Visit(operation, 1.0, computation)) > 0
        if operation.kind in ("reduce", "broadcast"):  # the estimate of a plain one is many times too much
            read = sum(computation[name].bytes for name in operation.operands if name in computation)
            seconds = min(seconds, (read + operation.bytes) / (self._chip.hbm_gb * 1e9))
        if operation.kind == "fusion":
            inside = inside_of(self._computations, operation)
            multiplies = any(hlo.matmul_flops(visit) > 0 for visit in inside)
            here = [visit.operation for visit in inside if hlo.collective(visit.operation)]
            mine = [one for one in here if hlo.identity(one) not in self._started]
            times.parts["collectives_in_line"] += sum(self._on_links(one) for one in mine)
        times.parts[_part(_module(operation) or module, multiplies)] += seconds

    # --------------------------------------------------------------------------- the inside of an operation

    def _names(self, operation: hlo.Operation) -> list[str]:
        return [name for name in hlo.called(operation) if name in self._computations]

    def _inner(self, operation: hlo.Operation) -> list[hlo.Computation]:
        return [self._computations[name] for name in self._names(operation)]

    def _on_links(self, operation: hlo.Operation) -> float:
        """Seconds of a collective, 0 for other operations."""
        found = hlo.collective(operation)
        return collective_seconds(*found, hlo.group(operation), self._target) if found else 0.0


def inside_of(computations: dict[str, hlo.Computation], operation: hlo.Operation) -> list[hlo.Visit]:
    """All operations of a fusion, and of those in it."""
    found = []
    for name in hlo.called(operation):
        for one in computations.get(name, {}).values():
            found.append(hlo.Visit(one, 1.0, computations[name]))
            if one.kind in ("fusion", "call"):
                found += inside_of(computations, one)
    return found


def parts_of(program: hlo.Module, attends: Callable[[hlo.Visit], bool]) -> dict[str, str]:
    """The part of PARTS of each operation by its name, to which its time belongs when it is measured.

    `attends` knows attention kernels. What waits for the end of a collective is `collectives_waited_for`.
    """
    found = {}
    for computation in program.computations.values():
        module = _module_of(computation)
        for operation in computation.values():
            visit = hlo.Visit(operation, 1.0, computation)
            inside = [visit, *(inside_of(program.computations, operation) if operation.kind == "fusion" else ())]
            where = _module(operation) or module
            moved = any(hlo.collective(one.operation) for one in inside)
            if moved and any(hlo.ends(one.computation) for one in inside[1:]) or _ends_one(operation):
                found[operation.name] = "collectives_waited_for"
            elif hlo.collective(operation):
                found[operation.name] = "collectives_in_line"
            elif attends(visit) and where != "other":
                found[operation.name] = f"{where}_attention"
            else:
                found[operation.name] = _part(where, any(hlo.matmul_flops(one) > 0 for one in inside))
    return found


def _ends_one(operation: hlo.Operation) -> bool:
    """Whether an operation is the end of a collective that went on beside others."""
    return (
        operation.kind.removesuffix("-done") in (*hlo.COLLECTIVES, "async", "call") and operation.kind[-5:] == "-done"
    )


def _part(where: str, multiplies: bool) -> str:
    """The part of what no kernel and no collective is."""
    return "head_and_optimizer" if where == "other" else f"{where}_{'products' if multiplies else 'elementwise'}"


def collective_seconds(kind: str, moved: int, devices: list[int], target: Slices) -> float:
    """Seconds of a collective of `moved` bytes (see `hlo.collective`) among devices of a slice or of several.

    Every device gets what the others have (of an all-reduce, twice) over the links by which its group lies: of a
    group in one line, one link in one way; of a larger one, two.
    """
    if len(devices) < 2:
        return 0.0
    inner = target.devices // target.slices
    slices = len({device // inner for device in devices})
    rounds = 2.0 if kind == "all-reduce" else 1.0
    seconds, here = 0.0, len(devices) // slices
    if kind == "collective-permute":
        return moved / (DCN_GB * 1e9 if slices > 1 else _link(target.chip, target) * 1e9)
    if slices > 1:
        seconds += rounds * moved / here * (slices - 1) / slices / (DCN_GB * 1e9)
    seconds += rounds * moved * (here - 1) / here / (_link(target.chip, target) * _ways(here, target) * 1e9)
    return seconds


def _link(chip: Chip, target: Slices) -> float:
    """GB/s of one link in one way."""
    return REACHED * chip.link_gb / (2 * max(2, target.topology.count("x") + 1))


def _ways(devices: int, target: Slices) -> int:
    """How many links bring a device what the others of its group have."""
    longest = max(int(size) for size in target.topology.split("x"))
    return 1 if devices <= longest else 2


def _module(operation: hlo.Operation) -> str:
    """`vision` or `llm` where an operation's scope names it, `other` where it names neither, "" without a scope."""
    scope = operation.scope
    return next((name for name in _MODULES if name in scope), "other") if scope else ""


def _module_of(computation: hlo.Computation) -> str:
    """Where most operations of a computation come from, for those that do not say."""
    counts = Counter(found for operation in computation.values() if (found := _module(operation)))
    return counts.most_common(1)[0][0] if counts else "other"
