"""What curation wrote."""

import json
from pathlib import Path


def rows_of(path: Path) -> list[dict]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
