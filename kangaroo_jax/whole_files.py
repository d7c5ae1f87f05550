"""Files that are there whole or not at all."""

import json
from pathlib import Path


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text under a temporary name beside `path`, then rename it. Returns the path."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    return temporary.replace(path)


def write_json(path: Path, value: object) -> Path:
    """The same for JSON, one space a level."""
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False))
