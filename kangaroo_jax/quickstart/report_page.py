"""`report.html`: the results of a curriculum as one page that needs no network and no script.

`write_report(path, data)` takes a plain dictionary. Only `title` and `stages` are needed; a part whose key is
missing or empty is left out. Shares are from 0 to 1, times of frames are seconds, frames are the bytes of PNG
or JPEG files.

    {
      "title": str,
      "lead": str,                          a sentence below the title
      "seconds": float,                     of the whole run
      "peak_rss_gib": float,
      "chance": float,                      of a multiple-choice question
      "stages": [{                          in order; a text warm-up may come first
        "name": str, "steps": int, "seconds": float,
        "losses": [[step, loss], ...],      steps count anew in each stage
        "metrics": {name: share},           short_mcq, long_mcq, image_mcq, open_exact, en_mcq, zh_mcq, ...
        "by_kind": {"group/kind": {"accuracy": share, "count": int}},
        "useful_token_share": float,
      }],
      "samples": [{"frames": [bytes], "times": [float], "question": str, "options": [str], "answer": str,
                   "truth": str, "language": str, "kind": str, "correct": bool}],
      "chats": [{"title": str, "frames": [bytes], "times": [float], "turns": [(role, text)]}],
      "ablations": [{"name": str, "metrics": {name: share}, any other key: any value}],
      "sections": [str],                    more of the page as HTML
      "environment": {name: value},         the key "commands" may hold a list of command lines
    }

`answer` and `truth` of a multiple-choice sample are letters, `options` their texts in order.
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from kangaroo_jax.evaluation.scoring import extract_letter
from kangaroo_jax.report.charts import bar_chart, escape, loss_chart, stage_label
from kangaroo_jax.report.style import STYLE
from kangaroo_jax.system.files import write_text

NAMES = {
    "short": "Short clips",
    "long": "Long videos",
    "image": "Images",
    "short_mcq": "Short clips",
    "long_mcq": "Long videos",
    "image_mcq": "Images",
    "open_exact": "Open questions",
    "en_mcq": "English",
    "zh_mcq": "Chinese",
    "mcq": "Multiple choice",
    "open": "Open",
    "second_t": "at second t",
}
CHARTED = ("short_mcq", "long_mcq", "open_exact")


def write_report(path: str | Path, data: Mapping) -> Path:
    """Write the page for `data` (see the top of this module) to `path`, in one step. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_text(path, render_report(data))


def render_report(data: Mapping) -> str:
    """The page for `data` as HTML text. Raises ValueError where a frame is neither PNG nor JPEG."""
    title = escape(data["title"])
    sections = [
        _header(data),
        _losses(data["stages"]),
        _accuracy(data),
        _kinds(data),
        _languages(data),
        _samples(data.get("samples") or ()),
        _chats(data.get("chats") or ()),
        _ablations(data.get("ablations") or ()),
        *(data.get("sections") or ()),
        _environment(data.get("environment") or {}),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n<footer>Written by kangaroo_jax. This file holds all that it shows.</footer>\n</main>\n</body>\n</html>\n"
    )


# ---------------------------------------------------------------------------------------------- small parts


def _name(key: str) -> str:
    return NAMES.get(key, key.replace("_", " "))


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _language(text: str) -> str:
    """The lang attribute of a text: Chinese characters make it Chinese."""
    return ' lang="zh-Hans"' if any("\u3400" <= c <= "\u9fff" for c in text) else ""


def _section(title: str, lead: str, body: str) -> str:
    return f'<section>\n<h2>{escape(title)}</h2>\n<p class="lead">{escape(lead)}</p>\n{body}\n</section>'


def _card(body: str) -> str:
    return f'<div class="card">{body}</div>'


def _cell(tag: str, column: int, text: str) -> str:
    kind = ' class="number"' if column else ""
    return f"<{tag}{kind}>{escape(text)}</{tag}>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table: the first column is text, the others are right-aligned; cells are escaped here."""
    head = "".join(_cell("th", i, cell) for i, cell in enumerate(header))
    body = "".join("<tr>" + "".join(_cell("td", i, c) for i, c in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="plain"><tr>{head}</tr>{body}</table></div>'


def _frames(frames: Sequence[bytes], times: Sequence[float]) -> str:
    """A strip of frames with their seconds below."""
    figures = []
    for frame, seconds in zip(frames, times, strict=True):
        if frame[:8] == b"\x89PNG\r\n\x1a\n":
            kind = "png"
        elif frame[:2] == b"\xff\xd8":
            kind = "jpeg"
        else:
            raise ValueError("frames must be the bytes of PNG or JPEG files")
        source = f"data:image/{kind};base64,{base64.b64encode(frame).decode()}"
        label = f"{seconds:.1f}".removesuffix(".0") + " s"
        figures.append(f'<figure><img src="{source}" alt="frame at {label}"><figcaption>{label}</figcaption></figure>')
    return f'<div class="frames">{"".join(figures)}</div>' if figures else ""


def _evaluated(stages: Sequence[Mapping]) -> list[Mapping]:
    return [stage for stage in stages if stage.get("metrics")]


# ---------------------------------------------------------------------------------------------- sections


def _header(data: Mapping) -> str:
    stages = _evaluated(data["stages"])
    metrics = stages[-1]["metrics"] if stages else {}
    chance = data.get("chance")
    against = "multiple choice" + (f", chance {chance:.0%}" if chance is not None else "")
    tiles = []
    for key in ("short_mcq", "long_mcq"):
        if key in metrics:
            tiles.append((_name(key), _percent(metrics[key]), against))
    if "open_exact" in metrics:
        tiles.append(("Open questions", _percent(metrics["open_exact"]), "exact match"))
    if "en_mcq" in metrics and "zh_mcq" in metrics:
        gap = 100 * (metrics["zh_mcq"] - metrics["en_mcq"])
        pair = f"points from English: {_percent(metrics['zh_mcq'])} and {_percent(metrics['en_mcq'])}"
        tiles.append(("Chinese", f"{gap:+.1f}".replace("-", "−"), pair))
    if "seconds" in data:
        tiles.append(("Time", _duration(data["seconds"]), "the whole run"))
    if "peak_rss_gib" in data:
        tiles.append(("Memory", f"{data['peak_rss_gib']:.1f} GiB", "at the peak"))
    body = "".join(
        f'<div class="tile"><span class="name">{escape(name)}</span>'
        f"<b>{escape(value)}</b><span>{escape(note)}</span></div>"
        for name, value, note in tiles
    )
    lead = f'<p class="lead">{escape(data["lead"])}</p>' if data.get("lead") else ""
    return f'<header>\n<h1>{escape(data["title"])}</h1>\n{lead}\n<div class="tiles">{body}</div>\n</header>'


def _losses(stages: Sequence[Mapping]) -> str:
    drawn = [(s["name"], s["steps"], [tuple(pair) for pair in s.get("losses") or ()]) for s in stages]
    rows = []
    for stage in stages:
        losses, useful = stage.get("losses") or (), stage.get("useful_token_share")
        last = [loss for _, loss in losses[-10:]]
        rows.append(
            (
                stage_label(stage["name"]),
                f"{stage['steps']:,}",
                _duration(stage["seconds"]) if "seconds" in stage else "–",
                f"{losses[0][1]:.3f}" if losses else "–",
                f"{sum(last) / len(last):.3f}" if last else "–",
                _percent(useful),
            )
        )
    header = ("Stage", "Steps", "Time", "First loss", "Last loss", "Useful tokens")
    lead = (
        "Loss of each stage over its steps, on a logarithmic scale: pale as measured, bold smoothed. Stages differ "
        "in what they learn from and what is trained, so their losses do not join. The wider a band, the more steps."
    )
    return _section("Training", lead, _card(loss_chart(drawn)) + _card(_table(header, rows)))


def _accuracy(data: Mapping) -> str:
    stages = _evaluated(data["stages"])
    if not stages:
        return ""
    keys = [key for key in CHARTED if any(key in s["metrics"] for s in stages)]
    series = [(_name(key), [s["metrics"].get(key) for s in stages]) for key in keys]
    chart = bar_chart([s["name"] for s in stages], series, data.get("chance"))
    lead = (
        "On held-out media, from generated answers: the letter of multiple-choice questions on short clips and long "
        "videos, exact match of open questions. The dashed line is guessing among four options."
    )
    return _section("Accuracy after each stage", lead, _card(chart))


def _kinds(data: Mapping) -> str:
    stages = [s for s in data["stages"] if s.get("by_kind")]
    if not stages:
        return ""
    kinds = sorted({kind for s in stages for kind in s["by_kind"]}, key=lambda k: k.rpartition("/")[::2])
    head = "".join(f'<th class="heat">{escape(stage_label(s["name"]))}</th>' for s in stages)
    rows, group = [f'<tr><th>Kind of question</th><th class="number">Asked</th>{head}</tr>'], None
    for kind in kinds:
        above, _, short = kind.rpartition("/")
        if above != group:
            group = above
            first, *rest = (_name(part) for part in above.split("/"))
            title = ", ".join([first, *(part.lower() for part in rest)])
            rows.append(f'<tr class="group"><th colspan="{len(stages) + 2}">{escape(title)}</th></tr>' if above else "")
        count = max(s["by_kind"].get(kind, {}).get("count", 0) for s in stages)
        cells = "".join(_heat(s["by_kind"].get(kind, {}).get("accuracy")) for s in stages)
        rows.append(f'<tr><td>{escape(_name(short))}</td><td class="number">{count}</td>{cells}</tr>')
    lead = "Share of right answers, in percent. The stronger the colour, the better."
    if data.get("chance") is not None:
        lead += f" Guessing gives {data['chance']:.0%} of multiple-choice and next to none of the open questions."
    table = f'<div class="scroll"><table>{"".join(rows)}</table></div>'
    return _section("Kinds of question", lead, _card(table))


def _heat(share: float | None) -> str:
    if share is None:
        return '<td class="heat">–</td>'
    ink = "color:var(--heat-ink);" if share > 0.6 else ""
    mix = f"background:color-mix(in srgb,var(--heat) {100 * share:.0f}%,transparent)"
    return f'<td class="heat" style="{ink}{mix}">{100 * share:.0f}</td>'


def _languages(data: Mapping) -> str:
    stages = [s for s in _evaluated(data["stages"]) if "en_mcq" in s["metrics"] and "zh_mcq" in s["metrics"]]
    if not stages:
        return ""
    series = [(_name(key), [s["metrics"][key] for s in stages]) for key in ("en_mcq", "zh_mcq")]
    chart = bar_chart([s["name"] for s in stages], series, data.get("chance"), height=220)
    lead = "The same questions on the same videos, with the same options in the same order, in both languages."
    return _section("English and Chinese", lead, _card(chart))


def _samples(samples: Sequence[Mapping]) -> str:
    if not samples:
        return ""
    right = sum(bool(s["correct"]) for s in samples)
    lead = f"Held-out videos and images with the model's own words: {right} of these {len(samples)} are right."
    return _section("What it sees and says", lead, f'<div class="samples">{"".join(map(_sample, samples))}</div>')


def _sample(sample: Mapping) -> str:
    verdict = '<span class="tag good">✓ right</span>' if sample["correct"] else '<span class="tag bad">✗ wrong</span>'
    language = {"en": "English", "zh": "Chinese"}.get(sample["language"], sample["language"])
    tags = verdict + "".join(f'<span class="tag">{escape(t)}</span>' for t in (_name(sample["kind"]), language))
    question, options = sample["question"], list(sample.get("options") or ())
    items, said = [], extract_letter(sample["answer"]) if options else ""
    for letter, option in zip("ABCDEFGHIJ", options, strict=False):
        mark = "good" if letter == sample["truth"] else "bad" if letter == said else ""
        items.append(f'<li class="{mark}"{_language(option)}>{letter}. {escape(option)}</li>')
    if options:  # the question may hold the options, which are listed below it
        question = question.split("\nA")[0]
    listed = f'<ul class="options">{"".join(items)}</ul>' if items else ""
    answer, truth = sample["answer"], sample["truth"]
    return _card(
        f'{_frames(sample["frames"], sample["times"])}<div class="tags">{tags}</div>'
        f'<p class="question"{_language(question)}>{escape(question)}</p>{listed}'
        f'<p class="verdict">answer <b{_language(answer)}>{escape(answer) or "(nothing)"}</b>'
        f" · truth <b{_language(truth)}>{escape(truth)}</b></p>"
    )


def _turn(role: str, text: str) -> str:
    side = "user" if role in ("user", "human") else "model"
    return f'<div class="turn {side}"{_language(text)}>{escape(text)}</div>'


def _chats(chats: Sequence[Mapping]) -> str:
    cards = []
    for chat in chats:
        turns = "".join(_turn(role, text) for role, text in chat["turns"])
        strip = _frames(chat.get("frames") or (), chat.get("times") or ())
        cards.append(_card(f'<h3>{escape(chat["title"])}</h3>{strip}<div class="chat">{turns}</div>'))
    lead = "Several rounds on one held-out video each: questions on the right, the model on the left."
    return _section("A chat", lead, "".join(cards)) if cards else ""


def _ablations(ablations: Sequence[Mapping]) -> str:
    if not ablations:
        return ""
    metrics = list(dict.fromkeys(key for row in ablations for key in row.get("metrics", {})))
    others = list(dict.fromkeys(key for row in ablations for key in row if key not in ("name", "metrics")))
    rows = []
    for row in ablations:
        shares = [_percent(row.get("metrics", {}).get(key)) for key in metrics]
        values = [row.get(key, "–") for key in others]
        rows.append(
            [row["name"], *shares, *(f"{v:,.1f}" if isinstance(v, float) else str(v) for v in values)],
        )
    header = ["Model", *map(_name, metrics), *map(_name, others)]
    lead = "The same run with one part of the design taken away."
    return _section("What each part is worth", lead, _card(_table(header, rows)))


def _environment(environment: Mapping) -> str:
    if not environment:
        return ""
    rows = [(key, str(value)) for key, value in environment.items() if key != "commands"]
    commands = environment.get("commands") or ()
    lines = "\n".join([commands] if isinstance(commands, str) else commands)
    block = f"<pre>{escape(lines)}</pre>" if lines else ""
    table = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in rows)
    body = f'<div class="scroll"><table class="plain">{table}</table></div>{block}'
    return _section("Environment", "What it was measured on, and how to run it again.", _card(body))
