"""Reads the schedule of a Pallas kernel: the instruction bundles, one a cycle, that libtpu writes for it.

A kernel is a loop over the steps of its grid. In its body stands what every step does, and regions that some steps
skip: what the first step of a row does, what a visited block costs, and what the last step of a row does.
"""

import dataclasses
import re

# Flags of libtpu that make it write the schedules of everything that it compiles into a folder.
DUMP_FLAGS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
FILES = "*_*-final_bundles.txt"

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:L[BHE]|P[BF])?\s*:\s*((?:> ?)*)")
_REGION = re.compile(r"(Start/End empty|Start|End) region (\d+)")
_TRIPS = re.compile(r"scmp\.\w+\.s32\.totalorder \S+, (\d+) /\* loop exit test")
_PRODUCT = re.compile(r"\bvmat(?:mul|push)|\bvdwg|\bvmatres")
_MOST = 0.9  # of the products: what is in a visited block


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Cycles of a kernel by what makes them necessary."""

    step: int  # of every step of the grid
    visited: int  # of a step whose block is visited, beside that
    first: int  # of the first step of a row of blocks, and
    last: int  # of its last
    trips: int  # of the loop on one core; it prefetches, so that there are a few more than steps of the grid

    def cycles(self, steps: float, visited: float, rows: float) -> float:
        """Cycles of so many steps of a grid, so many visited blocks and so many rows of blocks."""
        return steps * self.step + visited * self.visited + rows * (self.first + self.last)


Span = tuple[int, int]  # first and last bundle


def read(text: str) -> Schedule:
    """The schedule of a kernel. Raises ValueError where the text is not of a kernel with one loop over its grid."""
    in_loop, products, regions = _parsed(text)
    trips = [int(count) for count in _TRIPS.findall(text)]
    if not products or not trips or max(in_loop, default=0) > 1:
        raise ValueError("not the bundles of a kernel that multiplies in one loop")
    whole = sum(1 for depth in in_loop if depth)
    block = _block(regions, products)
    if block is None:
        return Schedule(0, whole, 0, 0, max(trips))
    end = max(last for first, last in regions if abs(first - block[0]) <= 1)  # what falls through into the last part
    idle = [span for span in regions if not any(span[0] <= place <= span[1] for place in products)]
    inside = [i for i, depth in enumerate(in_loop) if depth]
    outer = _body(regions, block, inside)
    before = _covered([span for span in idle if outer[0] <= span[0] and span[1] < block[0]])
    after = end - block[1] if end < outer[1] - 1 else 0
    after += _covered([span for span in idle if max(end, block[1]) < span[0] and span[1] <= outer[1]])
    visited = block[1] - block[0] + 1
    return Schedule(whole - visited - before - after, visited, before, after, max(trips))


def _parsed(text: str) -> tuple[list[int], list[int], list[Span]]:
    """(depth of loops of each bundle, bundles that multiply, regions that are not empty)."""
    depths: list[int] = []
    products: list[int] = []
    opened: dict[str, int] = {}
    regions: list[Span] = []
    for line in text.splitlines():
        if found := _BUNDLE.match(line):
            if _PRODUCT.search(line):
                products.append(len(depths))
            depths.append(found.group(1).count(">"))
        here = len(depths) - 1
        for what, number in _REGION.findall(line):
            if what == "Start":
                opened[number] = here
            elif number in opened:
                regions.append((opened.pop(number), here))
    return depths, products, [span for span in regions if span[1] > span[0]]


def _block(regions: list[Span], products: list[int]) -> Span | None:
    """The smallest region with nearly all products."""
    counts = [(last - first, (first, last)) for first, last in regions if _products(products, first, last) >= _MOST]
    return min(counts)[1] if counts else None


def _products(products: list[int], first: int, last: int) -> float:
    return sum(first <= place <= last for place in products) / len(products)


def _body(regions: list[Span], block: Span, inside: list[int]) -> Span:
    """The smallest region around the block that holds more than it and what it falls through into, or the loop."""
    around = [(last - first, (first, last)) for first, last in regions if first < block[0] - 1 and block[1] < last]
    return min(around)[1] if around else (inside[0], inside[-1])


def _covered(spans: list[Span]) -> int:
    """How many bundles are in any of the spans."""
    return len({place for first, last in spans for place in range(first, last + 1)})
