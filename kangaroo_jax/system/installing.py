"""The command that installs what an extra of this package brings, for messages about packages that are missing."""

import importlib.metadata
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

DISTRIBUTION = "kangaroo-jax"


def install_line(*extras: str) -> str:
    """The pip command for extras of setup.py (`curation`, `convert`, ...), as it works on this machine.

    A clone is installed again with its extras. Where the package was installed without one, what the extras ask for is
    named package by package: no registry need know this one.
    """
    clone = Path(__file__).resolve().parents[2]
    if not (clone / "setup.py").is_file():
        try:
            packages = requirements(importlib.metadata.requires(DISTRIBUTION) or (), extras)
            return shlex.join(["pip", "install", *packages])
        except importlib.metadata.PackageNotFoundError:  # a bare copy of the package, which only a clone can mend
            clone = Path(".")
    place = "." if clone == Path.cwd() else str(clone)
    wanted = f"{place}[{','.join(extras)}]".replace("'", "'\"'\"'")
    return f"pip install -e '{wanted}'"  # in quotes, always: some shells read a bare `[` as a pattern


def requirements(declared: Sequence[str], extras: Sequence[str]) -> list[str]:
    """Those of a distribution's requirements that belong to extras, without the part of their marker that says so."""
    found: list[str] = []
    for requirement in declared:
        package, _, marker = requirement.partition(";")
        named = re.search(r"""extra\s*==\s*['"]([\w-]+)['"]""", marker)
        if named and named[1] in extras:
            rest = re.sub(r"\s*(\band\b)?\s*" + re.escape(named[0]), "", marker).strip()
            found.append(f"{package.strip()}; {rest}" if rest else package.strip())
    return list(dict.fromkeys(found))
