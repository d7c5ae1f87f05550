"""What others wrote is text in the pages that are made of it, and nothing that runs."""

import html.parser
import json
from pathlib import Path

from PIL import Image

from kangaroo_jax.config_files import load_config
from kangaroo_jax.curation.curate import Options, curate
from kangaroo_jax.curation.report import write_report

MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg onload=alert(3)>"


class Active(html.parser.HTMLParser):
    """Elements and attributes that would run something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [tag] * (tag in ("script", "iframe", "object", "embed", "link", "base", "form"))
        self.found += [f"{tag} {key}" for key, _ in attrs if key.startswith("on")]
        self.found += [
            f"{tag} {value}"
            for key, value in attrs
            if key in ("src", "href") and not (value or "").startswith("data:image")
        ]


def test_the_report_of_a_curation_shows_markup_as_text(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    rows = []
    for i in range(4):
        name = f"{'<i onclick=alert(4)>' if i == 0 else 'b'}{i}.png"
        Image.new("RGB", (640, 480), (50 * i, 90, 200 - 40 * i)).save(folder / name)
        keys = ("caption", "category", "source", "licence", "id")
        rows.append({"path": name, "language": "en"} | {key: f"{MARKUP} {key} {i}" for key in keys})
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, root = load_config("curation").unlock(), tmp_path / "out"
    for stage in ("text", "face", "caption_language"):
        config[stage].enabled = False
    config.engine.workers = 1
    curate(Options(str(root), (str(folder / "m.jsonl"),)), config)
    ids = [json.loads(line)["id"] for name in ("selected.jsonl", "dropped.jsonl") for line in open(root / name)]
    turns = [{"from": MARKUP, "value": MARKUP}, {"role": MARKUP, "content": MARKUP}]
    captions = [{"clip": name, "caption": MARKUP, "conversations": turns} for name in ids]
    (root / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
    page = write_report(root, config.select.to_dict(), str(root / "c.jsonl")).read_text()
    active = Active()
    active.feed(page)
    assert not active.found
    assert page.count("&lt;script&gt;") >= len(ids) and all(set("<>\"'& ").isdisjoint(name) for name in ids)
