"""Counts a compiled program's matrix FLOPs, kernels and collectives from its text, with loops in full.

XLA's own cost analysis counts the body of a loop once and a Pallas kernel not at all. This walks the optimised HLO of
one device from its entry, multiplies by the trip counts of the enclosing loops, and keeps each operation's JAX scope.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "s4": 1, "u4": 1, "bf16": 2, "f16": 2, "c64": 8, "c128": 16, "token": 0}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")

_OPERATION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"(pred|token|[a-z]+\d+\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"\b(calls|to_apply|body|called_computations|branch_computations|true_computation|"
                     r"false_computation|async_execution_thread)=(\{[^}]*\}|%?[\w.\-]+)")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of HLO."""

    name: str
    kind: str  # opcode
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # (dtype, dimensions) of each array of the result
    operands: tuple[str, ...]
    text: str
    root: bool
    scatters: bool = False  # an all-reduce of which each device keeps a part alone, so that it is a reduce-scatter

    @property
    def scope(self) -> str:
        """JAX's name of the operation, "" if it has none."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found.group(1) if found else ""

    @property
    def bytes(self) -> int:
        """Size of the result."""
        return sum(_width(dtype) * math.prod(dimensions) for dtype, dimensions in self.shapes)

    def attribute(self, name: str) -> str | None:
        """The value of `name=...`, braces removed."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.text)
        return found.group(1).strip("{}") if found else None


Computation = dict[str, Operation]


class Module(NamedTuple):
    """A parsed program."""

    computations: dict[str, Computation]  # operations in the order in which they are scheduled
    entry: str


@dataclasses.dataclass(frozen=True)
class Visit:
    """An operation and how often the program runs it."""

    operation: Operation
    times: float
    computation: Computation

    def operand_shape(self, index: int) -> tuple[int, ...]:
        """Dimensions of an operand."""
        return self.computation[self.operation.operands[index]].shapes[0][1]


def parse(text: str) -> Module:
    """An HLO module's text. Raises ValueError if it has no entry."""
    computations: dict[str, Computation] = {}
    entry, current, scatters = "", None, False
    text = text.replace("={\n", "={").replace("\n}}", "}}")  # a kernel's metadata spans several lines
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header.group(2), {})
            scatters = header.group(2).startswith("all-reduce-scatter")
            entry = header.group(2) if header.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _OPERATION.match(line)):
            operation = _operation(found.group(2), found.group(3), bool(found.group(1)), scatters)
            current[operation.name] = operation
    if not entry:
        raise ValueError("no ENTRY computation: not the text of an HLO module")
    return Module(computations, entry)


def walk(program: str | Module, unknown_trips: int = 1) -> Iterator[Visit]:
    """Every operation that the program (its text, or what `parse` made of it) runs, and how often it runs.

    `unknown_trips` is assumed for loops whose trip count is only known at run time.
    """
    computations, entry = parse(program) if isinstance(program, str) else program
    yield from _walk(computations, entry, 1.0, unknown_trips)


def _walk(computations: dict[str, Computation], name: str, times: float, unknown: int) -> Iterator[Visit]:
    computation = computations[name]
    for operation in computation.values():
        yield Visit(operation, times, computation)
        if operation.kind == "while":
            trips = trip_count(computations, computation, operation)
            body = operation.attribute("body")
            assert body is not None
            yield from _walk(computations, body.lstrip("%"), times * (unknown if trips is None else trips), unknown)
        elif operation.kind in ("fusion", "call", "conditional", "async-start", "call-start", "custom-call"):
            for inner in called(operation):
                if inner in computations:
                    yield from _walk(computations, inner, times, unknown)


def called(operation: Operation) -> list[str]:
    """Names of the computations that an operation runs, but for loops."""
    names = []
    for key, value in _CALLED.findall(operation.text):
        if key != "async_execution_thread" and not (key == "to_apply" and not operation.kind.startswith("call")):
            names += [name.strip().lstrip("%") for name in value.strip("{}").split(",")]
    return names


# ------------------------------------------------------------------------------------- FLOPs


def matmul_flops(visit: Visit) -> float:
    """FLOPs (a multiplication and an addition are two) of a `dot` (cuBLAS's, too) or `convolution`, times its visits.

    0 for anything else.
    """
    operation = visit.operation
    cublas = re.search(r'"__cublas\$.*"lhs_contracting_dimensions":\[([^\]]*)\]', operation.text)
    if operation.kind == "dot" or cublas:
        left = visit.operand_shape(0)
        contracted = cublas.group(1).replace('"', "") if cublas else operation.attribute("lhs_contracting_dims") or ""
        depth = math.prod(left[int(i)] for i in contracted.split(",") if i)
        return 2.0 * depth * math.prod(operation.shapes[0][1]) * visit.times
    if operation.kind == "convolution":
        return 2.0 * _convolution_depth(visit) * math.prod(operation.shapes[0][1]) * visit.times
    return 0.0


def _convolution_depth(visit: Visit) -> float:
    """Products summed for one element of a convolution's result.

    TPU programs express matrix products as convolutions, and batch dimensions as windows whose stride and padding
    leave one valid position each. So only positions inside the input count.
    """
    operation = visit.operation
    labels = operation.attribute("dim_labels")
    assert labels is not None
    left, kernel, result = re.split(r"_|->", labels)
    kernel_shape, left_shape = visit.operand_shape(1), visit.operand_shape(0)
    depth = float(kernel_shape[kernel.index("i")])  # input features of a group
    spatial = sorted(c for c in kernel if c.isdigit())
    window = _window(operation, len(spatial))
    for i, label in enumerate(spatial):
        out = operation.shapes[0][1][result.index(label)]
        positions = _valid_positions(left_shape[left.index(label)], kernel_shape[kernel.index(label)], out, *window[i])
        depth *= positions / out if out else 0.0
    return depth


def _window(operation: Operation, dimensions: int) -> list[tuple[int, int, int, int]]:
    """(stride, low padding, input dilation, kernel dilation) of every spatial dimension."""
    text = operation.attribute("window") or ""
    fields = dict(part.split("=", 1) for part in text.split() if "=" in part)

    def numbers(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * dimensions

    pads = [int(pad.split("_")[0]) for pad in numbers("pad", "0_0")]
    rest = [[int(n) for n in numbers(name, "1")] for name in ("stride", "lhs_dilate", "rhs_dilate")]
    return [(rest[0][i], pads[i], rest[1][i], rest[2][i]) for i in range(dimensions)]


def _valid_positions(size: int, kernel: int, out: int, stride: int, low: int, dilate: int, kernel_dilate: int) -> int:
    """Pairs (position of the result, position of the kernel) that fall on an element of the input, not on padding."""
    if kernel == 1 and low == 0 and dilate == 1:
        return out
    total, reach = 0, (size - 1) * dilate
    for position in range(out):
        first = position * stride - low
        total += sum(
            1
            for k in range(kernel)
            if 0 <= first + k * kernel_dilate <= reach and (first + k * kernel_dilate) % dilate == 0
        )
    return total


# ------------------------------------------------------------------------------- collectives


def collective(operation: Operation) -> tuple[str, int] | None:
    """(kind, bytes that one device receives or sends, whichever is more) of a collective; None for other operations."""
    kind = operation.kind.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    sizes = [_width(dtype) * math.prod(dimensions) for dtype, dimensions in operation.shapes]
    count = len(operation.operands)
    if operation.scatters:
        return "reduce-scatter", sum(sizes)
    if operation.kind.endswith("-start") and len(sizes) > count:  # what goes in, what comes out, the compiler's own
        return kind, max(sum(sizes[:count]), sum(sizes[count : 2 * count]))
    return kind, sum(sizes) * (max(1, len(group(operation))) if kind == "reduce-scatter" else 1)


def moves(program: Module, unknown_trips: int = 1) -> Iterator[tuple[str, float, Visit]]:
    """(kind, bytes as in `collective` times its visits, the visit) of every collective, each once.

    A TPU program may spread one over several fusions, in which it stands again with the same `identity`: one that
    starts it, computations beside which it goes on, and one that ends it.
    """
    started = identities_started(program)
    for visit in walk(program, unknown_trips):
        found = collective(visit.operation)
        if found and (starts(visit.computation) or identity(visit.operation) not in started):
            yield found[0], found[1] * visit.times, visit


def identities_started(program: Module) -> set[str]:
    """The identities of collectives that a fusion starts and another one ends."""
    fused = (computation for computation in program.computations.values() if starts(computation))
    return {identity(operation) for computation in fused for operation in computation.values() if collective(operation)}


def starts(computation: Computation) -> bool:
    """Whether a computation starts a collective that goes on beside others."""
    return any("AsyncCollectiveStart" in operation.text for operation in computation.values())


def ends(computation: Computation) -> bool:
    """Whether a computation ends a collective that went on beside others."""
    return any("AsyncCollectiveDone" in operation.text for operation in computation.values())


def identity(operation: Operation) -> str:
    """What a collective is known by: its channel, kind and shapes. All that JAX wrote by itself have channel 1."""
    return f"{operation.attribute('channel_id') or ''} {operation.kind.removesuffix('-start')} {operation.shapes}"


def group(operation: Operation) -> list[int]:
    """The devices of a collective's first replica group.

    They are written as {{0,1},{2,3}}, as [2,2]<=[4] (with T(...) where a transposed array is meant), or by the axes of
    a mesh.
    """
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", operation.text):
        return [int(device) for device in found.group(1).split(",") if device]
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", operation.text):
        devices = np.arange(int(found.group(1)) * int(found.group(2))).reshape(_dimensions(found.group(3)))
        turned = devices.transpose(_dimensions(found.group(4))) if found.group(4) else devices
        return [int(device) for device in turned.reshape(-1, int(found.group(2)))[0]]
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", operation.text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found.group(1))}
        index = tuple(slice(None) if f"'{name}'" in found.group(2) else 0 for name in sizes)
        return [int(device) for device in np.arange(math.prod(sizes.values())).reshape(*sizes.values())[index].flat]
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", operation.text):
        return [int(found.group(1)), int(found.group(2))]
    return []


# --------------------------------------------------------------------------------- trip counts


def trip_count(computations: dict[str, Computation], outer: Computation, loop: Operation) -> int | None:
    """The trip count of a while loop, as noted by XLA or from its counter; None if it depends on the run."""
    noted = re.search(r'known_trip_count"?:?\s*[={]\s*"?(?:n"?:?\s*"?)?(\d+)', loop.text)
    if noted:
        return int(noted.group(1))
    condition = computations[(loop.attribute("condition") or "").lstrip("%")]
    body = computations[(loop.attribute("body") or "").lstrip("%")]
    compare = _compare(computations, condition)
    initial = outer.get(loop.operands[0])
    if compare is None or initial is None or initial.kind != "tuple":
        return None
    direction, sides = compare
    counter = next((value for value in sides if isinstance(value, str)), None)
    if counter is None:
        return None
    index = int(counter)
    start = _constant(outer, initial.operands[index])
    step = _step(body, index)
    limits = [value for value in sides if value is not counter]
    limit = limits[0] if limits and isinstance(limits[0], int) else None
    if limit is None and len(sides) == 2 and isinstance(sides[1], str):
        limit = _constant(outer, initial.operands[int(sides[1])])
    if start is None or step is None or limit is None:
        return None
    limit += direction == "LE" and step > 0
    return max(0, -(-(limit - start) // step)) if direction in ("LT", "LE", "NE") else None


def _compare(computations: dict[str, Computation], condition: Computation) -> tuple[str, list[int | str]] | None:
    """(direction, sides) of a comparison; a side is a constant, or the index of an element of the loop's tuple."""
    root = next(operation for operation in condition.values() if operation.root)
    arguments: list[str] | None = None
    inner = condition
    if root.kind == "fusion":
        inner = computations[called(root)[0]]
        arguments = list(root.operands)
        root = next(operation for operation in inner.values() if operation.root)
    if root.kind != "compare":
        return None

    def side(name: str, scope: Computation) -> int | str | None:
        operation = scope[name]
        if operation.kind == "parameter" and arguments is not None and scope is inner:
            number = re.search(r"parameter\((\d+)\)", operation.text)
            return side(arguments[int(number.group(1))], condition) if number else None
        if operation.kind == "get-tuple-element":
            return operation.attribute("index")
        if operation.kind in ("copy", "bitcast", "convert"):
            return side(operation.operands[0], scope)
        return _constant(scope, name)

    sides = [side(name, inner) for name in root.operands]
    if any(value is None for value in sides):
        return None
    return root.attribute("direction") or "", [value for value in sides if value is not None]


def _constant(scope: Computation, name: str) -> int | None:
    operation = scope.get(name)
    while operation is not None and operation.kind in ("copy", "bitcast", "convert") and operation.operands:
        operation = scope.get(operation.operands[0])
    found = operation and re.search(r"constant\((-?\d+)\)", operation.text)
    return int(found.group(1)) if found else None


def _step(body: Computation, index: int) -> int | None:
    """The step that a trip adds to element `index` of the loop's tuple; 1 if the sum is not found."""
    root = next(operation for operation in body.values() if operation.root)
    if root.kind != "tuple":
        return 1
    operation = body.get(root.operands[index])
    while operation is not None and operation.kind in ("copy", "bitcast"):
        operation = body.get(operation.operands[0])
    if operation is not None and operation.kind == "add":
        amounts = [amount for name in operation.operands if (amount := _constant(body, name)) is not None]
        return amounts[0] if amounts else 1
    return 1


# ---------------------------------------------------------------------------------- the text


def _operation(name: str, rest: str, root: bool, scatters: bool) -> Operation:
    """Parse the text after `name = `, in a computation that is a reduce-scatter or is not."""
    end = _type_end(rest)
    shapes = tuple((dtype, _dimensions(text)) for dtype, text in _ARRAY.findall(rest[:end]))
    kind, _, tail = rest[end:].strip().partition("(")
    arguments = _balanced(tail)
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments)) or tuple(
        part.strip().split(" ")[-1] for part in arguments.split(",") if part.strip()
    )
    kind = kind.strip()
    return Operation(name, kind, shapes, operands, rest, root, scatters and kind == "all-reduce")


def _type_end(rest: str) -> int:
    """The end of the result's type, in which tuples are in parentheses and layouts in braces."""
    depth = 0
    for i, character in enumerate(rest):
        depth += character in "({"
        depth -= character in ")}"
        if depth == 0 and character == " ":
            return i
    return len(rest)


def _balanced(text: str) -> str:
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:i]
    return text


def _dimensions(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _width(dtype: str) -> int:
    if dtype in BYTES:
        return BYTES[dtype]
    bits = re.match(r"[a-z]+(\d+)", dtype)
    return max(1, int(bits.group(1)) // 8) if bits else 0
