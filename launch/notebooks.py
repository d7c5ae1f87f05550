"""Makes launch/colab/*.ipynb of the percent sources beside them; needs jupytext (the extra `dev`).

    python launch/notebooks.py

Change the `.py` file, run this, and commit both: a test holds that they agree. Cells are named by their place, so that
the same source makes the same file.
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "colab"
SOURCES = sorted(FOLDER.glob("*.py"))


def notebook(source: Path) -> str:
    """The text of the notebook of a percent source, without outputs."""
    import jupytext

    read = jupytext.read(source)
    cells: list[dict[str, Any]] = [json.loads(json.dumps(cell)) for cell in read.cells]
    for i, cell in enumerate(cells):
        cell["id"] = f"{source.stem}-{i}"
        cell["source"] = cell["source"].splitlines(keepends=True)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__":
    for path in SOURCES:
        path.with_suffix(".ipynb").write_text(notebook(path), encoding="utf-8")
        print(path.with_suffix(".ipynb").relative_to(FOLDER.parents[1]))
