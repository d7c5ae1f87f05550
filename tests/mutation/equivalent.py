"""Mutants that change nothing that a test could see: "path | line | changed line" -> why."""

EQUIVALENT: dict[str, str] = {}
