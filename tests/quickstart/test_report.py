"""The figures in this file are invented: they only have to be drawn."""

import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from kangaroo_jax.quickstart import judging
from kangaroo_jax.quickstart.report_page import render_report, write_report
from kangaroo_jax.report.charts import bar_chart, loss_chart, smooth, stage_label, thin

VOID = {"meta", "img", "br", "hr", "link", "input"}
STAGES = (
    "stage0_text_warmup",
    "stage1_image_pretrain",
    "stage2_video_pretrain",
    "stage3_refine",
    "stage4_instruct",
    "stage5_long_video",
)
KINDS = ("what", "colour", "direction", "count", "first", "last", "second_t", "duration")


class Checker(html.parser.HTMLParser):
    """Checks that tags close in order and gathers what is fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.sources = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [v for k, v in attributes if k in ("src", "href", "xlink:href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def picture(kind, level):
    pixels = np.full((48, 48, 3), 20, np.uint8)
    pixels[12:36, level : level + 16] = (235, 45, 45)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def demo(samples=6):
    """Invented results of a run."""
    rng, stages = np.random.default_rng(0), []
    for i, name in enumerate(STAGES):
        steps = (900, 600, 600, 300, 500, 400)[i]
        curve = [[s, float(0.15 + 4 / (1 + i) * np.exp(-s / 120) * rng.uniform(0.8, 1.2))] for s in range(0, steps, 5)]
        stage = dict(name=name, steps=steps, seconds=60.0 + 9 * i, losses=curve, useful_token_share=0.8 + 0.03 * i)
        if i:
            level = min(0.97, 0.2 + 0.16 * i)
            shares = dict(
                short_mcq=level, long_mcq=level * 0.9, open_exact=level * 0.8, en_mcq=level, zh_mcq=level - 0.02
            )
            groups = [f"{g}/{k}" for g in ("short/mcq", "short/open", "long/mcq") for k in KINDS]
            kinds = {k: dict(accuracy=float(np.clip(level + rng.normal() / 12, 0, 1)), count=40) for k in groups}
            stage.update(metrics=shares, by_kind=kinds)
        stages.append(stage)
    frames, times = [picture("PNG", 2 + 4 * j) for j in range(8)], [j + 0.5 for j in range(8)]
    asked = [
        dict(
            question="Which way does it move?\nA. left\nB. up\nC. right\nD. down",
            options=["left", "up", "right", "down"],
        ),
        dict(question="它是什么颜色？\nA、红色\nB、蓝色\nC、白色\nD、绿色", options=["红色", "蓝色", "白色", "绿色"]),
        dict(question="How long is the video?", options=[]),
    ]
    says = [("C", "C", "en", "direction"), ("B", "A", "zh", "colour"), ("8 seconds", "8 seconds", "en", "duration")]
    shown = []
    for j in range(samples):
        answer, truth, language, kind = says[j % 3]
        base = dict(frames=frames, times=times, answer=answer, truth=truth, language=language, kind=kind)
        shown.append(base | asked[j % 3] | {"correct": answer == truth})
    turns = [("user", "Describe the video."), ("assistant", "a red 7 moves right")]
    turns += [("user", "视频有多长？"), ("assistant", "8秒")]
    chats = [dict(title=t, frames=frames, times=times, turns=turns) for t in ("A short video", "A long video")]
    ablations = [
        dict(name="whole", metrics=dict(short_mcq=0.95, long_mcq=0.88), steps_per_minute=312.0),
        dict(name="without temporal position encoding", metrics=dict(short_mcq=0.81), steps_per_minute=318.0),
    ]
    return dict(
        title="A demo with invented figures",
        lead="Nothing on this page was measured: it shows what the report looks like.",
        seconds=754.0,
        peak_rss_gib=2.9,
        chance=0.25,
        stages=stages,
        samples=shown,
        chats=chats,
        ablations=ablations,
        environment=dict(
            cores="2", jax="0.10.2", commands=["./launch/quickstart.sh --workdir=DIR", "./launch/test.sh"]
        ),
    )


def check(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


def test_the_page_is_whole_and_fetches_nothing(tmp_path):
    path = write_report(tmp_path / "sub" / "report.html", demo())
    page = path.read_text(encoding="utf-8")
    checker = check(page)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert checker.tags.count("svg") == 3 and "script" not in checker.tags and "link" not in checker.tags
    assert checker.sources and all(s.startswith("data:image/png;base64,") for s in checker.sources)
    assert not re.search(r"https?://|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page


def test_the_page_tells_the_results():
    page = render_report(demo())
    for text in ("97.0%", "chance 25%", "12.6 min", "2.9 GiB", "−2.0", "Stage 5 long video", "at second t"):
        assert text in page, text
    assert "✗ wrong" in page and "4 of these 6 are right" in page
    assert (
        '<li class="bad" lang="zh-Hans">B. 蓝色</li>' in page and '<li class="good" lang="zh-Hans">A. 红色</li>' in page
    )
    assert "./launch/quickstart.sh --workdir=DIR" in page and "without temporal position encoding" in page
    assert page.count("Which way does it move?") == 2 and "A. left\nB. up" not in page


def test_text_is_escaped():
    data = demo(samples=1)
    data["title"] = "<script>alert(1)</script>"
    data["samples"][0].update(answer="<b>&", options=[], question="<i>?")
    data["environment"] = {"<u>": "<s>", "commands": "a && b"}
    page = render_report(data)
    check(page)
    assert "<script" not in page and "&lt;b&gt;&amp;" in page and "a &amp;&amp; b" in page


def test_missing_parts_are_left_out():
    page = render_report({"title": "t", "stages": [dict(name="stage1_image_pretrain", steps=0, losses=[])]})
    checker = check(page)
    assert checker.tags.count("section") == 1 and checker.tags.count("svg") == 1


def test_a_frame_of_another_kind_is_refused():
    data = demo(samples=1)
    data["samples"][0]["frames"] = [b"GIF89a"] * 8
    with pytest.raises(ValueError, match="PNG or JPEG"):
        render_report(data)
    data["samples"][0]["frames"] = [picture("JPEG", 3)] * 8
    assert "data:image/jpeg;base64," in render_report(data)


def test_charts_stay_in_their_frame():
    curve = [(s, 10.0 ** (-s / 100)) for s in range(0, 500, 5)] + [(499, float("nan")), (500, 0.0)]
    chart = loss_chart([("stage1_image_pretrain", 500, curve), ("other", 10, [])])
    for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", chart):
        assert 40 <= float(x) <= 960 and 0 <= float(y) <= 320
    bars = bar_chart(["a", "b"], [("x", [0.5, None]), ("y", [1.2, -1.0])], chance=0.25)
    assert bars.count("<title>") == 3
    assert all(float(h) >= 0 for h in re.findall(r'height="([-\d.]+)"', bars))


def test_small_helpers():
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smooth([4.0, 0.0], 0.5) == pytest.approx([4.0, 4 / 3])
    points = [(float(i), 0.0) for i in range(1000)]
    assert len(thin(points, 100)) == 101 and thin(points, 100)[-1] == points[-1] and thin([]) == []
    assert (
        stage_label("stage1_image_pretrain") == "Stage 1 image pretrain"
        and stage_label("stage0_text_warmup") == "Text warmup"
    )


def test_the_judged_section_has_maps_of_both_stages_and_the_controls():
    def cells(found):
        shown = {"mode": "frame", "length": "16 frames", "shown": 1.0, "found": found}
        return [shown | {"depth": depth} for depth in ("0%", "100%")]

    controls = {"no-video": {"score": 0.25, "adds": 0.5, "adds_low": 0.4, "adds_high": 0.6}}
    told = {"needles": {"stage4_instruct": cells(0.0), "stage5_long_video": cells(1.0)}, "official": 0.48}
    page = judging.report_section({**told, "controls": controls}, 0.92)
    assert "Needles: frame, stage4" in page and "Needles: frame, stage5" in page
    assert "48% of the held-out" in page and "+40% to +60%" in page
