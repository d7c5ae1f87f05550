"""The site: pages that are read off the code agree with it, and MkDocs builds all of it strictly, offline."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.test_docs import check

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


def test_the_gallery_shows_all_that_it_holds_in_small_files_that_fetch_nothing():
    folder = ROOT / "docs" / "gallery"
    page = (folder / "index.md").read_text(encoding="utf-8")
    pictures = {path.name for path in folder.iterdir() if path.suffix in (".svg", ".png")}
    assert {name for name in re.findall(r"[\w/.]+\.(?:svg|png)", page) if "/" not in name} == pictures
    for name in pictures:
        assert (folder / name).stat().st_size <= 200_000, name
        if name.endswith(".svg"):
            text = (folder / name).read_text(encoding="utf-8")
            ElementTree.fromstring(text)
            assert not re.search(r"(?:href=|url\()[\"']?http", text) and "/tmp/" not in text


def test_the_commands_of_the_gallery_exist():
    source = (ROOT / "docs" / "gallery" / "make.py").read_text(encoding="utf-8")
    found = re.findall(r'^ +f?"(kangaroo .+)",$', source, re.M)
    assert len(found) == 3
    for command in found:
        check(re.sub(r"\{+\w+\}+", "x", command), whole=True)


@pytest.mark.slow
def test_zensical_builds_the_site_too(tmp_path):
    pytest.importorskip("zensical")
    for name in ("docs", "kangaroo_jax"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    line = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "max_new_tokens" in (tmp_path / "site" / "reference" / "api.html").read_text(encoding="utf-8")


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
