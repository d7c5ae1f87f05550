"""Mutants of a source file: the same file with one small change, each a mistake that somebody could make.

What is only said to people (messages, prints, docstrings), annotations and hints to the compiler are left alone.
"""

import ast
import dataclasses
import re
from collections.abc import Iterator

COMPARISONS = {
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
ARITHMETIC = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}
FUNCTIONS = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "sum": "max",
    "mean": "sum",
    "maximum": "minimum",
    "minimum": "maximum",
    "sin": "cos",
    "cos": "sin",
    "sum_over": "max_over",
    "argmax": "argmin",
    "sorted": "list",
    "round": "int",
    "ceil": "floor",
}
# Calls that change no result: hints to the compiler, and what is printed.
HINTS = {"constrain", "keep", "named_scope", "checkpoint_name", "tell", "_tell", "print", "TypeVar", "save_picture"}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of one file, by bytes."""

    path: str
    line: int
    operator: str
    start: int
    end: int
    new: str
    before: str  # the line as it is
    after: str  # the first changed line as it would be

    @property
    def name(self) -> str:
        """What it is called in results: the change itself, so that other edits of the file do not rename it."""
        return f"{self.path} | {self.before} | {self.after}"

    def apply(self, source: bytes) -> bytes:
        """The changed file."""
        return source[: self.start] + self.new.encode() + source[self.end :]


def mutants_of(path: str, source: bytes) -> list[Mutant]:
    """Every mutant of a file, in the order of the file; those that do not compile are left out."""
    found: dict[str, Mutant] = {}
    for operator, start, end, new in _Finder(source).changes():
        changed = source[:start] + new.encode() + source[end:]
        try:
            compile(changed, path, "exec")
        except SyntaxError:
            continue
        line = source.count(b"\n", 0, start)
        before, after = source.splitlines()[line].decode().strip(), changed.splitlines()[line].decode().strip()
        mutant = Mutant(path, line + 1, operator, start, end, new, before, after)
        if before != after:
            found.setdefault(mutant.name, mutant)
    return list(found.values())


class _Finder:
    """The places of a file that can be changed."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def changes(self) -> Iterator[tuple[str, int, int, str]]:
        """(operator, first byte, end, new text)."""
        yield from self._walk(ast.parse(self.source))

    def _span(self, node: ast.AST) -> tuple[int, int]:
        start = self.starts[node.lineno - 1] + node.col_offset
        return start, self.starts[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: ast.AST) -> str:
        start, end = self._span(node)
        return self.source[start:end].decode()

    def _walk(self, node: ast.AST) -> Iterator[tuple[str, int, int, str]]:
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Assert):
            return
        if isinstance(node, ast.Call) and _called(node) in HINTS:
            return
        yield from self._here(node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "slice_annotation"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self._walk(child)

    def _here(self, node: ast.AST) -> Iterator[tuple[str, int, int, str]]:
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            for left, operation, right in zip(operands[:-1], node.ops, node.comparators, strict=True):
                yield from self._between("compare", left, right, COMPARISONS[type(operation)])
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            yield from self._between("arithmetic", node.left, node.right, ARITHMETIC[type(node.op)])
        elif isinstance(node, ast.BoolOp):
            change = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            yield from self._between("boolean", node.values[0], node.values[1], change)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            start, end = self._span(node)
            yield "sign", start, end, f"({self._text(node.operand)})"
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            start, end = self._span(node)
            yield "constant", start, end, _other(node.value)
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            start, end = self._span(node.test)
            yield "condition", start, end, f"(not ({self._text(node.test)}))"
        elif isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
            old, new = ARITHMETIC[type(node.op)]
            yield from self._between("arithmetic", node.target, node.value, (old + "=", new + "="))
        elif isinstance(node, ast.Call):
            yield from self._call(node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _called(node.value) not in HINTS:
            yield "statement", *self._span(node), "pass"
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            used = {name.id for name in ast.walk(node.value) if isinstance(name, ast.Name)}
            hint = isinstance(node.value, ast.Call) and _called(node.value) in HINTS
            if node.targets[0].id in used and not hint:
                yield "statement", *self._span(node), "pass"

    def _call(self, node: ast.Call) -> Iterator[tuple[str, int, int, str]]:
        function = node.func
        name = _called(node)
        if name in FUNCTIONS:
            _, end = self._span(function)
            yield "function", end - len(name), end, FUNCTIONS[name]
        for keyword in node.keywords:
            if keyword.arg is not None and len(node.args) + len(node.keywords) > 1:
                start, end = self._span(keyword)
                rest = re.match(rb"\s*,", self.source[end:])
                if rest:
                    yield "keyword", start, end + rest.end(), ""
                else:
                    before = self.source[:start].rstrip()
                    if before.endswith(b","):
                        yield "keyword", len(before) - 1, end, ""

    def _between(
        self, operator: str, left: ast.AST, right: ast.AST, change: tuple[str, str]
    ) -> Iterator[tuple[str, int, int, str]]:
        start, end = self._span(left)[1], self._span(right)[0]
        pattern = rb"\s+".join(re.escape(part.encode()) for part in change[0].split())
        found = re.search(pattern, self.source[start:end])
        if found:
            yield operator, start + found.start(), start + found.end(), change[1]


def _called(node: ast.Call) -> str:
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


def _other(value: int | float | bool) -> str:
    if isinstance(value, bool):
        return str(not value)
    return repr(value + 1 if isinstance(value, int) or value == 0 else 2 * value)
