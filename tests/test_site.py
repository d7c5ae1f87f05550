"""The site: pages that are read off the code agree with it, and MkDocs builds all of it strictly, offline."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
generate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(generate)


@pytest.mark.parametrize("name", generate.PAGES)
def test_a_page_of_the_reference_is_what_the_code_says(name):
    assert (generate.FOLDER / name).read_text(encoding="utf-8") == generate.PAGES[name](), "run python docs/generate.py"


def test_comments_belong_to_the_fields_beside_or_below_them():
    source = '''
class First(Section):
    """Says nothing of keys."""

    PATH = "config.first"  # where

    a: int = 1  # of a
    # above b, which
    # goes on
    b: tuple[tuple[str, float], ...] = (("x", 1.0),)  # and beside
    c: int = 2
    # after all


class Second(Section):
    a: int = 3  # of the other a
'''
    assert generate.comments(source) == {
        ("First", "a"): "of a",
        ("First", "b"): "above b, which goes on and beside",
        ("Second", "a"): "of the other a",
    }


def test_every_page_is_in_the_navigation_and_every_question_has_an_answer():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    named = set(re.findall(r"[\w/]+\.md", navigation))
    assert named == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    faq = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^\*\*.+\*\*", faq, re.M)) >= 20


@pytest.mark.slow
def test_the_site_builds_strictly_without_a_network(tmp_path):
    pytest.importorskip("mkdocs")
    alone = ["unshare", "--user", "--net"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        alone = []
    line = [*alone, sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "model.html").read_text(encoding="utf-8")
    assert "model.svg" in page and (tmp_path / "model.svg").exists()
    assert "fonts.googleapis" not in page and 'src="http' not in page
    assert "max_new_tokens" in (tmp_path / "reference" / "api.html").read_text(encoding="utf-8")
