"""What a stranger reads: links that lead somewhere, a README of one screen whose figures say where they are from."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / ".github").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
MEASUREMENTS = ROOT / "docs" / "measurements"


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
