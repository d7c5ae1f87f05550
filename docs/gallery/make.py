"""Records the gallery: sessions of a terminal as SVG, reports as PNG.

    python docs/gallery/make.py --quickstart=DIR --evaluation=DIR --finetune=DIR [--only=NAME]

The folders are those of a quickstart, of `kangaroo eval` and of `kangaroo finetune`. Commands are run here and now, in
a pseudo terminal; what they print, with its times, is drawn by rich, where the folders of this machine have the names
that the page gives them. Reports are photographed by a headless Chromium.
"""

import argparse
import io
import os
import pty
import re
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

FOLDER = Path(__file__).parent
CLONE = str(FOLDER.resolve().parents[1])
COLUMNS, LONGEST = 108, 10.0  # characters of a line; seconds that a replay takes at most
KILOBYTES = 200  # of a picture, at most
CLIP = "{quickstart}/corpus/media/{clip}"
# Name -> title, command, lines that are typed when the prompt stands there.
SESSIONS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "chat": (
        "Three rounds about a clip that the model has never seen",
        f"kangaroo chat --checkpoint={{quickstart}} --video={CLIP}",
        ("Describe the video.", "What comes first?", "最后出现什么？", ""),
    ),
    "finetune": (
        "What a fine-tune will need, and its first batch, before it starts",
        "kangaroo finetune --base={quickstart} --data=clips.csv --workdir=runs/mine --dry-run",
        (),
    ),
    "plan": (
        "A stage of the 8B model on 64 H100s, planned on a laptop",
        "kangaroo plan --config=stage5_long_video:kangaroo_8b --topology=H100:64 --price-per-chip-hour=2.5",
        (),
    ),
}
PAGES = {  # name -> folder of the arguments, file in it, height in pixels
    "quickstart": ("quickstart", "report.html", 1300),
    "curation": ("quickstart", "curation/scored/report.html", 780),
    "evaluation": ("evaluation", "report.html", 1000),
    "held_out": ("finetune", "held_out/report.html", 1090),
}
PROMPT = re.compile(r"(?:^|\n)> ?$")
FORMAT = """<svg viewBox="0 0 {terminal_width} {terminal_height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font-size: 18px; font-family: sans-serif; }}
@keyframes show {{ from {{ opacity: 0 }} to {{ opacity: 1 }} }}
@media (prefers-reduced-motion) {{ text {{ animation: none !important }} }}
{styles}
</style>
<defs>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g></g></svg>
"""


def record(command: str, typed: tuple[str, ...], folder: Path) -> tuple[str, list[float]]:
    """What a command prints in a terminal, and the second in which each line ended."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.environ.update(TERM="dumb", COLUMNS=str(COLUMNS), JAX_PLATFORMS="cpu")
        os.execvp("bash", ["bash", "-c", command])
    begun, output, ends, waiting = time.monotonic(), b"", [], list(typed)
    while True:
        ready, _, _ = select.select([terminal], [], [], 1.0)
        if ready:
            try:
                piece = os.read(terminal, 4096)
            except OSError:  # the child has closed it
                break
            if not piece:
                break
            output += piece
            ends += [time.monotonic() - begun] * piece.count(b"\n")
        elif waiting and PROMPT.search(output.decode(errors="ignore").replace("\r", "")):
            os.write(terminal, waiting.pop(0).encode() + b"\n")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        sys.exit(f"{command}: ended with {code}\n{output.decode(errors='replace')}")
    return output.decode(errors="replace").replace("\r\n", "\n"), ends


def shown(text: str) -> str:
    """Lines as a terminal leaves them: of those that were written over, the last state."""
    return "\n".join(line.rpartition("\r")[2] for line in text.split("\n"))


def draw(name: str, title: str, command: str, output: str, ends: list[float]) -> None:
    """Write the SVG: the command, then each line at its time, all within LONGEST seconds."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), color_system="truecolor", force_terminal=True)
    seconds = [0.0]
    scale = min(1.0, LONGEST / max(ends, default=1.0))
    console.print(Text.assemble(("$ ", "bold green"), (command, "bold")), soft_wrap=False)
    seconds += [0.0] * (len(Text(f"$ {command}").wrap(console, COLUMNS)) - 1)
    for line, end in zip(shown(output).rstrip("\n").split("\n"), [*ends, ends[-1]], strict=False):
        text = Text.from_ansi(line)
        seconds += [end * scale] * max(1, len(text.wrap(console, COLUMNS)))
        console.print(text)
    svg = console.export_svg(title=title, code_format=FORMAT, unique_id=name)

    def timed(match: re.Match[str]) -> str:
        at = seconds[min(int(match[1]), len(seconds) - 1)]
        return f'{match[0]} style="animation: show 0.1s {at:.1f}s both"'

    svg = re.sub(rf'clip-path="url\(#{name}-line-(\d+)\)"', timed, svg)
    svg = re.sub(r' textLength="[^"]+"(?=[^>]*>[^<]*[\u3000-\uffff])', "", svg)  # which counts wide characters as one
    (FOLDER / f"{name}.svg").write_text(svg, encoding="utf-8")


def photograph(page: Path, name: str, height: int) -> None:
    """A picture of the top of a page, of at most KILOBYTES."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        browser = "chromium-headless-shell"
        flags = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size=900,{height}"]
        command = [browser, *flags, f"--screenshot={shot}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        picture = Image.open(shot).convert("RGB")
        for colours in (256, 128, 64, 32):
            target = FOLDER / f"{name}.png"
            picture.quantize(colours, dither=Image.Dither.NONE).save(target, optimize=True)
            if target.stat().st_size <= 1000 * KILOBYTES:
                return


def main() -> None:
    """Make all, or what `--only` names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--quickstart", "--evaluation", "--finetune"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--data", type=Path, help="clips.csv of the session `finetune`")
    parser.add_argument("--clip", default="held_out/short/00000.mp4", help="of the session `chat`")
    parser.add_argument("--only", choices=[*SESSIONS, *PAGES], help="one of them")
    given = parser.parse_args()
    for name, (title, command, typed) in SESSIONS.items():
        if given.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                here = Path(folder)
                (here / "runs").mkdir()
                (here / "runs" / "quickstart").symlink_to(given.quickstart.resolve())
                if given.data:
                    for path in given.data.parent.glob("*.mp4"):
                        (here / path.name).symlink_to(path.resolve())
                    (here / "clips.csv").write_bytes(given.data.read_bytes())
                line = command.format(quickstart="runs/quickstart", clip=given.clip)
                output, ends = record(line, typed, here)
                output = output.replace(str(given.quickstart.resolve()), "runs/quickstart").replace(CLONE, ".")
                draw(name, title, line, output, ends)
            print(f"docs/gallery/{name}.svg")
    for name, (folder_of, file, height) in PAGES.items():
        if given.only in (None, name):
            photograph(getattr(given, folder_of) / file, name, height)
            print(f"docs/gallery/{name}.png")


if __name__ == "__main__":
    main()
