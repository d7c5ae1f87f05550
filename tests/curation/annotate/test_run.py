"""The whole of `kangaroo annotate` against a real socket server that fails on purpose."""

import json
from collections import Counter

import pytest

from kangaroo_jax.bench.annotate import bench_annotate, statistics_of
from kangaroo_jax.curation.annotate.config import annotation_config
from kangaroo_jax.curation.annotate.files import read_clips
from kangaroo_jax.curation.annotate.run import annotate_clips, estimate
from kangaroo_jax.errors import UserError
from tests.curation.rows import rows_of


def no_words(line: str) -> None:
    """Nothing is to be printed."""


def test_faults_lose_and_double_nothing_and_a_second_run_asks_nothing(tmp_path, server, make_clips, make_config):
    source = make_clips(tmp_path / "in", 12, frames=3)
    config = make_config(server)
    annotate_clips(source, tmp_path / "out", config, tell=no_words)
    rows = rows_of(tmp_path / "out/captions.jsonl")
    assert [row["id"] for row in rows] == [f"clip{i:04d}-{lang}" for i in range(12) for lang in ("en", "zh")]
    assert Counter(row["outcome"] for row in rows) == {"ok": 24}
    after, summary = statistics_of(server), json.loads((tmp_path / "out/annotation.json").read_text())
    asked = 12 * (3 * 3 + 2)
    assert after["answered"] == asked
    late = sum(one["faults"].get("timeout", 0) for one in summary["this_run"].values()) - after["given"]["hang"]
    assert after["doubled"] <= max(late, 0)  # only answers that came after this slow machine had given up on them
    assert sum(one["answers"] for one in summary["all_runs"].values()) == asked
    assert sum(sum(one["faults"].values()) for one in summary["this_run"].values()) > 5
    row = rows[3]
    assert row["language"] == "zh" and row["models"]["writer"] == "writer" and len(row["frames"]) == 3
    assert row["media"] == "../in/media/0001.mp4" and row["frames"][2]["path"] == "../in/frames/0001_2.jpg"
    assert row["frames"][1]["time"] == 2.0 and len(row["frames"][1]["captions"]) == 3
    assert row["prompts"]["video_caption"].startswith("video_caption.zh@1:")

    refined = rows_of(tmp_path / "out/refined.jsonl")
    assert Counter(row["category"] for row in refined if row["language"] == "en").most_common()[-1][1] == 2
    assert len(refined) == 12 and [r for r in rows if r["clip"] in {x["clip"] for x in refined}] == refined

    lines: list[str] = []
    annotate_clips(source, tmp_path / "out", config, tell=lines.append)
    assert len(lines) == 1 and "nothing to do" in lines[0]
    config.choose.count = 4  # what is asked stays the same: every answer is in the cache
    annotate_clips(source, tmp_path / "out", config, tell=no_words)
    summary = json.loads((tmp_path / "out/annotation.json").read_text())
    assert sum(one.get("calls", 0) for one in summary["this_run"].values()) == 0
    assert sum(one["from_cache"] for one in summary["this_run"].values()) == asked
    assert summary["refined_clips"] == 4 and statistics_of(server)["given"] == after["given"]


def test_order_and_text_do_not_depend_on_concurrency_or_faults(
    tmp_path, server, honest_server, make_clips, make_config
):
    source = make_clips(tmp_path / "in", 4, frames=2)
    texts = []
    for number, (url, concurrency) in enumerate(((server, 1), (server, 16), (honest_server, 5))):
        config = make_config(url, part_clips=3)
        for backend in config.backends.values():
            backend.concurrency = concurrency
        annotate_clips(source, tmp_path / f"out{number}", config, tell=no_words)
        texts.append([(tmp_path / f"out{number}" / f).read_bytes() for f in ("captions.jsonl", "refined.jsonl")])
    assert texts[0] == texts[1]
    assert len(texts[0][0].splitlines()) == 8
    told = [[row["caption"] for row in rows_of(tmp_path / f"out{n}/captions.jsonl")] for n in (1, 2)]
    assert told[0] == told[1] and len(set(told[0])) == 8


def test_an_estimate_counts_calls_that_the_cache_saves(tmp_path, honest_server, make_clips, make_config, capsys):
    source = make_clips(tmp_path / "in", 4, frames=2)
    config = make_config(honest_server)
    config.backends.captioner_a.update(price_in=1.0, price_out=10.0, image_tokens=500)
    clips = read_clips(source)
    before = estimate(clips, tmp_path / "out", config)
    assert before["backends"]["captioner_a"]["calls"] == 8 and before["backends"]["writer"]["calls"] == 8
    assert before["total"]["calls"] == 4 * (2 * 3 + 2) and before["missing_images"] == 0
    tokens = before["backends"]["captioner_a"]
    assert tokens["prompt_tokens"] > 8 * 500 and tokens["completion_tokens"] == 8 * 128
    money = (tokens["prompt_tokens"] + 10 * tokens["completion_tokens"]) / 1e6
    assert tokens["cost"] == pytest.approx(money, abs=1e-4) == before["total"]["cost"]
    annotate_clips(source, tmp_path / "out", config, tell=no_words)
    after = estimate(clips, tmp_path / "out", config)
    assert after["backends"]["captioner_a"]["calls"] == 0 and after["backends"]["captioner_a"]["from_cache"] == 8
    (tmp_path / "in/frames/0000_0.jpg").unlink()
    assert estimate(clips, tmp_path / "out", config)["missing_images"] == 1


def test_a_clip_whose_frames_cannot_be_read_is_an_error_and_costs_only_itself(
    tmp_path, honest_server, make_clips, make_config
):
    source = make_clips(tmp_path / "in", 3, frames=2)
    for k in range(2):
        (tmp_path / f"in/frames/0001_{k}.jpg").unlink()
    (tmp_path / "in/frames/0002_0.jpg").write_bytes(b"no picture")
    config = make_config(honest_server)
    annotate_clips(source, tmp_path / "out", config, tell=no_words)
    rows = rows_of(tmp_path / "out/captions.jsonl")
    assert [row["outcome"] for row in rows] == ["ok", "ok", "error", "error", "ok", "ok"]
    assert "0 of 2 were described" in rows[2]["reason"] and "0001_0.jpg" in rows[2]["reason"]
    assert rows[4]["frames"][0]["captions"][0]["reason"] == "image: no JPEG, PNG, WebP or GIF"
    assert {row["clip"] for row in rows_of(tmp_path / "out/refined.jsonl")} <= {"clip0000", "clip0002"}


def test_a_medium_behind_a_link_and_dots_is_found(tmp_path, make_clips):
    """Captions name the file that `link/../x` is to the system, from wherever they lie."""
    source = make_clips(tmp_path, 1)
    (row,) = rows_of(source)
    (tmp_path / "far/inner").mkdir(parents=True)
    (tmp_path / "far/a.jpg").touch()
    (source.parent / "link").symlink_to(tmp_path / "far/inner")
    source.write_text(json.dumps(row | {"keyframes": [{"path": "link/../a.jpg", "time": 0}]}))
    (clip,) = read_clips(source)
    assert clip.keyframes[0].path == str(tmp_path / "far/a.jpg")


@pytest.mark.slow
def test_five_thousand_requests():
    found = bench_annotate(5000, 64, 0.1)
    print(found)
    assert (found["lost"], found["answered"], found["again_from_cache"], found["again_different"]) == (0, 5000, 5000, 0)
    assert found["calls"] > 5300 and set(found["faults"]) == {
        "status 429",
        "status 503",
        "timeout",
        "truncated",
        "malformed",
    }


def test_what_failed_is_counted_and_whether_it_may_pass_is_said(tmp_path, honest_server, make_clips, make_config):
    source, config, lines = make_clips(tmp_path / "in", 3, frames=2), make_config(honest_server), []
    config.refine.min_words = 1000.0  # no caption is long enough, next time neither
    for _ in range(2):  # the second time, too: it is not finished
        with pytest.raises(UserError, match="none of the 6 captions is ok.*words are left.*would meet the same"):
            annotate_clips(source, tmp_path / "out", config, tell=no_words)
    config.refine.min_words = 8.0
    for k in range(2):
        (tmp_path / f"in/frames/0001_{k}.jpg").unlink()
    annotate_clips(source, tmp_path / "out", config, tell=lines.append)
    assert "2 captions are not ok, the first because of error (frames: 0 of 2" in "".join(lines)
    assert "may pass" not in "".join(lines)
    annotate_clips(source, tmp_path / "out", config, tell=lines.append)
    assert "finished already, 2 captions are not ok; nothing to do" in lines[-1]


def test_a_small_set_is_thinned_aloud_or_not_at_all(tmp_path, honest_server, make_clips, make_config):
    source, config, lines = make_clips(tmp_path / "in", 6, frames=1), make_config(honest_server), []
    config.choose.share = 1 / 3
    annotate_clips(source, tmp_path / "out", config, tell=lines.append)
    assert "2 of 6 clips chosen for refined.jsonl by choose.share=0.333333 and choose.at_least=0" in lines[-1]
    config.choose.at_least = 100  # the default
    annotate_clips(source, tmp_path / "out", config, tell=lines.append)
    assert "6 clips chosen; see" in lines[-1] and len(rows_of(tmp_path / "out/refined.jsonl")) == 12


def test_all_that_backends_lack_is_said_at_once(tmp_path, make_clips, monkeypatch):
    config = annotation_config("own")
    config.backends.writer.api_key_env = "NO_SUCH_KEY"
    with pytest.raises(UserError, match="captioner_a.checkpoint=.*backends.writer.model=.*NO_SUCH_KEY .of writer"):
        annotate_clips(make_clips(tmp_path / "in", 1), tmp_path / "out", config)
