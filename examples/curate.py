"""Choose clips among raw videos: two good ones, one that stands still, one that is cut off, one that is there twice.

    python examples/curate.py [--input=FOLDER] [--output=runs/examples/curated]

`selected.jsonl` and `dropped.jsonl` in the output say what was kept and why the rest was not; `report.html` shows it.
Text, faces and the language of captions are left out here, because each loads a model.
"""

import argparse
import json
import shutil
from pathlib import Path

from clips import write_clip

from kangaroo_jax import load_config
from kangaroo_jax.curation.curate import Options, curate


def main() -> None:
    """Score, choose, and print what became of each clip."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="a folder of videos, or a manifest")
    parser.add_argument("--output", type=Path, default=Path("runs/examples/curated"))
    arguments = parser.parse_args()

    raw = arguments.input or arguments.output.parent / "raw"
    if arguments.input is None:
        raw.mkdir(parents=True, exist_ok=True)
        write_clip(raw / "red.mp4", "red", "left", seed=1)
        write_clip(raw / "blue.mp4", "blue", "down", seed=2)
        write_clip(raw / "still.mp4", "green", seed=3)
        shutil.copy(raw / "red.mp4", raw / "red_again.mp4")
        (raw / "cut_off.mp4").write_bytes((raw / "blue.mp4").read_bytes()[:700])

    config = load_config("curation").unlock()
    config.text.enabled = config.face.enabled = config.caption_language.enabled = False
    config.select.min_short_side = 64  # the clips made here are small
    curate(Options(str(arguments.output), (str(raw),)), config.lock())
    for name in ("selected", "dropped"):
        for line in (arguments.output / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            print(f"{name:8}  {Path(row['media']).name:14} {row.get('rule', ''):10} {row.get('reason', '')}")


if __name__ == "__main__":  # curation starts processes, which import this file
    main()
