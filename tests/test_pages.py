"""What a stranger reads: links that lead somewhere, a README of one screen whose figures say where they are from."""

import re
from pathlib import Path

import pytest

from kangaroo_jax import __version__

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / ".github").rglob("*.md")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
MEASUREMENTS = ROOT / "docs" / "measurements"
CONTRIBUTING = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in ("CONTRIBUTING.md", "docs/extending.md"))


def text_of(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)


def anchors(page: Path) -> set[str]:
    """The names of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path, text: str) -> list[str]:
    """Links of a text that stands at `page` and lead to no file, or to no heading of one."""
    wrong = []
    for link in ("".join(groups) for groups in LINK.findall(text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or ROOT not in (target, *target.parents) or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_link_leads_somewhere(page):
    assert broken(page, text_of(page)) == []


def test_a_link_to_nowhere_is_found():
    text = '[a](docs/data.md#mixtures) [b](docs/none.md) [c](docs/data.md#none) <img src="docs/none.png">'
    assert broken(ROOT / "README.md", text) == ["docs/none.md", "docs/data.md#none", "docs/none.png"]


def test_the_readme_is_one_screen_and_names_both_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    assert "\n./launch/quickstart.sh " in text and "\n./launch/test.sh " in text and "docs/report.png" in text


def test_every_figure_of_the_readme_says_where_it_was_measured():
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Measured")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| [")]
    assert len(rows) == 6
    for row in rows:
        assert re.match(r"\| \[[^]]+\]\(docs/measurements/\w+\.md(#[\w-]+)?\)", row), row


@pytest.mark.parametrize("name", ["quickstart.md", "models.md", "data.md", "training.md"])
def test_a_page_of_measurements_has_date_commit_command_and_machine(name):
    page = (MEASUREMENTS / name).read_text(encoding="utf-8")
    assert "Machine: 2 CPU cores" in page and "older than today's code" in page
    for row in re.findall(r"^\| [^|]+ \|[^|]+\|[^|]+\| .+ \|$", page.partition("date, commit")[2], re.M):
        if "---" not in row and "| date, commit |" not in row:
            assert re.search(r"\| 20\d\d-\d\d-\d\d, `[0-9a-f]{7}`.* \|", row), row
    assert name in (MEASUREMENTS / "README.md").read_text(encoding="utf-8")


def test_what_holds_a_figure_is_there():
    text = (MEASUREMENTS / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:tests|docs)/[\w/.]+)`", text))
    assert len(named) > 12 and not [path for path in named if not (ROOT / path).exists()]


def test_the_letters_of_contributing_are_those_of_the_code():
    letters = re.findall(
        r"(?:^|, |: |\s)([A-Z]) (?=[a-z])", CONTRIBUTING.partition("docstrings:")[2].partition("##")[0]
    )
    conventions = (ROOT / "kangaroo_jax" / "conventions.py").read_text(encoding="utf-8")
    assert len(letters) == 14
    assert not [letter for letter in letters if not re.search(rf"\s{letter}  [a-zM]", conventions)]


def test_what_contributing_names_is_there():
    commands = re.findall(r"`python -m pytest -q ([^`]+)`", CONTRIBUTING)
    tests = {path for command in commands for path in command.split()}
    assert len(commands) > 8 and not [path for path in tests if not (ROOT / path).exists()]
    files = re.findall(r"`([\w/]+\.(?:py|md|sh))`", CONTRIBUTING)
    known = [path for path in files if "NAME" not in path]
    assert len(known) > 8 and not [
        p for p in known if not ((ROOT / p).exists() or (ROOT / "kangaroo_jax" / p).exists())
    ]
    for file, name in re.findall(r"`(\w+)` of\s+`([\w/.]+)`", CONTRIBUTING):
        assert re.search(rf"\b{file}\b", (ROOT / "kangaroo_jax" / name).read_text(encoding="utf-8")), (file, name)


def test_citation_and_changelog_have_the_version_of_the_package():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (
        citation["version"] == __version__
        and citation["references"][0]["identifiers"][0]["value"] == "arXiv:2408.15542"
    )
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", changelog, re.M)[:2] == ["[Unreleased]", f"{__version__} - 2026-11-23"]
    kinds = set(re.findall(r"^### (.+)$", changelog, re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_workflow_runs_ci_with_both_pythons_and_hooks_are_those_of_the_checks():
    yaml = pytest.importorskip("yaml")
    (job,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"].values()
    pythons = [step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert pythons == ["3.12", "3.11"] and job["steps"][-1]["run"] == ".ci/run"
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    checks = (ROOT / "launch/test.sh").read_text(encoding="utf-8")
    assert len(hooks) == 3 and all(f"\n{hook['entry']} " in checks for hook in hooks)
