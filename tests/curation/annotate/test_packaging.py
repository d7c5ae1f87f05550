"""What ships with the package, and that training does without all of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from kangaroo_jax.cli import main as cli
from kangaroo_jax.errors import UserError
from kangaroo_jax.llm_client.prompts import load_prompt

ROOT = Path(__file__).parents[3]
PROMPTS = sorted((ROOT / "kangaroo_jax/curation").glob("*/prompts/*.txt"))


def test_training_and_chat_import_nothing_of_curation():
    modules = "kangaroo_jax.training.loop, kangaroo_jax.training.curriculum, kangaroo_jax.inference.chat"
    names = "{'openai', 'jsonschema', 'httpx2', 'httpx', 'kangaroo_jax.curation'}"
    code = f"import sys, {modules}; sys.exit(bool({names} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_jobs_that_ask_models_begin_without_jax_and_pictures():
    modules = "kangaroo_jax.cli.main, kangaroo_jax.curation.annotate.run, kangaroo_jax.curation.instruct.run"
    configs = "from kangaroo_jax.config_files import load_config; load_config('annotation'); load_config('instruct')"
    names = "{'jax', 'grain', 'numpy', 'PIL', 'av', 'openai', 'cv2'}"
    code = f"import sys, {modules}; {configs}; print(sorted({names} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.name)
def test_every_prompt_is_there_in_both_languages_with_the_same_gaps(path):
    import re

    name, language, _ = path.name.split(".")
    prompt = load_prompt(path.parent, name, language)
    other = load_prompt(path.parent, name, "zh" if language == "en" else "en")
    assert prompt.version.startswith(f"{name}.{language}@1:")
    gaps = [sorted(set(re.findall(r"\{(\w+)\}", one.system + one.text))) for one in (prompt, other)]
    assert gaps[0] == gaps[1]


def test_a_prompt_of_ones_own_and_its_mistakes(tmp_path):
    (tmp_path / "mine.en.txt").write_text("# version 12\nYou look.\n---\nAt {time} s: {what}?", encoding="utf-8")
    prompt = load_prompt(tmp_path, "mine", "en")
    assert prompt.fill(time=3, what="{time}") == ("You look.", "At 3 s: {time}?")
    assert prompt.version.startswith("mine.en@12:")
    with pytest.raises(ValueError, match="gaps"):
        prompt.fill(time=3)
    (tmp_path / "mine.zh.txt").write_text("Look.")
    with pytest.raises(UserError, match="# version N"):
        load_prompt(tmp_path, "mine", "zh")
    with pytest.raises(UserError, match="cannot read the prompt"):
        load_prompt(tmp_path, "other", "en")


def test_the_wheel_has_patterns_for_every_file_that_is_no_module():
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    others = {path.suffix for path in (ROOT / "kangaroo_jax/curation/annotate").rglob("*.*")} - {".py", ".pyc"}
    assert others <= {".txt"} and '"kangaroo_jax.curation.annotate": ["prompts/*.txt"]' in text
    assert '["prompts/*.txt", "schema.json"]' in text


CLIP = '{"id": "a", "media": "a.mp4", "keyframes": [{"path": "a.jpg", "time": 1}]}\n'
BAD = {
    ("annotate",): "--input is missing",
    ("annotate", "--input=none.jsonl"): "none.jsonl: cannot be read",
    ("annotate", "--input=empty.jsonl"): "no clips in it",
    ("annotate", "--input=broken.jsonl"): "broken.jsonl, line 2: not JSON",
    ("annotate", "--input=frames.jsonl"): "line 1: 'keyframes' must be a list",
    ("annotate", "--input=twice.jsonl"): "line 2: the id 'a' is taken by line 1",
    ("annotate", "--input=clip.jsonl"): "--config.backends.captioner_a.model=...",
    ("annotate", "--input=clip.jsonl", "--config=annotation:corpus"): "--config.backends.captioner_a.corpus=...",
    ("annotate", "--input=clip.jsonl", "--config=annotation:mine"): "unknown preset 'mine'",
    ("annotate", "--input=clip.jsonl", "--config.writer=writr"): "no backend 'writr' (did you mean 'writer'?)",
    ("annotate", "--input=clip.jsonl", "--config.languages=('en', 'fr')"): "no language 'fr'",
    ("instruct", "--input=clip.jsonl"): "no object of captions.jsonl",
    ("instruct", "--input=failed.jsonl"): "no caption in it is ok",
    ("instruct", "--input=clip.jsonl", "--config.options=1"): "config.options must be 2 to 8",
}


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_bad_input_is_one_line(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    caption = '{"id": "a-en", "clip": "a", "language": "en", "media": "a.mp4", "outcome": "error"}\n'
    files = {"empty": "\n", "clip": CLIP, "broken": CLIP + "{\n", "twice": CLIP * 2, "failed": caption}
    files["frames"] = '{"id": "a", "media": "a.mp4"}\n'
    for name, text in files.items():
        Path(f"{name}.jsonl").write_text(text)
    code = cli.main(list(arguments))
    error = capsys.readouterr().err
    assert code == 2 and BAD[arguments] in error and error.startswith("kangaroo: ") and error.count("\n") == 1
