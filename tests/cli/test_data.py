"""`kangaroo data`: what each job writes, prints and exits with."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from kangaroo_jax.cli.main import main
from kangaroo_jax.data.annotations.sources import AnnotationFile, read_conversations
from kangaroo_jax.data.media.video import probe
from kangaroo_jax.data.tokenizer import train_sentencepiece
from tests.data.media import numbered_frame, write_video


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three samples with a video, a photo and none; a tokenizer."""
    write_video(tmp_path / "a.mp4", 40, 8)
    Image.fromarray(numbered_frame(3)).save(tmp_path / "b.png")
    lines = []
    for i, (kind, name) in enumerate([("video", "a.mp4"), ("image", "b.png"), ("", "")]):
        tag = f"<{kind}>\n" if kind else ""
        talk = [
            {"from": "human", "value": tag + "What moves?"},
            {"from": "gpt", "value": "red 红色" if i else "A circle."},
        ]
        lines.append(json.dumps({"id": f"s{i}", "conversations": talk} | ({kind: name} if kind else {})))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    train_sentencepiece(["What moves? A red circle. 红色 user assistant"] * 40, tmp_path / "tokenizer.model", 300)
    return tmp_path


def run(*arguments: object) -> int:
    try:
        return main(["data", *map(str, arguments)])
    except SystemExit as error:  # of check, which found something
        return int(error.code or 0)


def test_check_names_each_bad_medium(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = data / "report.jsonl"
    assert run("check", data / "train.jsonl", "--report", report) == 0
    lines = {Path(line["path"]).name: line for line in map(json.loads, report.read_text().splitlines())}
    a = lines["a.mp4"]
    assert (a["codec"], a["frames"], a["monotonic"], a["sample"], a["problems"]) == ("h264", 40, True, "s0", [])
    assert a["seconds"] == pytest.approx(5.0) == a["stated_seconds"] and "mp4" in a["container"]
    cut = write_video(data / "cut.mp4", 80, options={"movflags": "faststart"})
    cut.write_bytes(cut.read_bytes()[: int(cut.stat().st_size * 0.6)])
    (data / "text.mp4").write_text("no video")
    capsys.readouterr()
    assert run("check", "--media", cut, data / "text.mp4", data / "b.png", "--report", report) == 1
    out = capsys.readouterr().out
    assert (
        "BAD" in out
        and "cut.mp4" in out
        and "text.mp4" in out
        and "3 media (1 images, 2 videos" in out
        and "2 bad" in out
    )
    lines = {Path(line["path"]).name: line for line in map(json.loads, report.read_text().splitlines())}
    assert lines["b.png"]["problems"] == [] and lines["cut.mp4"]["frames"] > 20 and lines["text.mp4"]["problems"]


def test_stats(data: Path) -> None:
    pytest.importorskip("matplotlib")
    out = data / "stats"
    arguments = ["--tokenizer", data / "tokenizer.model", "--config", "stage4_instruct:tiny", "--out", out]
    assert run("stats", data / "train.jsonl", *arguments) == 0
    stats = json.loads((out / "stats.json").read_text())
    assert (
        stats["samples"] == 3
        and stats["languages"] == {"zh": 2, "en": 1}
        and stats["media"] == {"video": 1, "image": 1}
    )
    assert stats["distributions"]["video_seconds"]["mean"] == 5.0 and stats["distributions"]["rounds"]["most"] == 1
    packing = stats["packing"]["stage4_instruct"]
    assert 0.3 < packing["useful_tokens"] <= packing["tokens_at_most"] + 1e-3
    assert packing["tokens_per_pack_that_fit"] % 128 == 0
    assert (out / "stats.png").stat().st_size > 1000


def test_stats_go_on_without_what_downloads_left_unfinished(data: Path) -> None:
    pytest.importorskip("matplotlib")
    members = {"0.txt": b" ", "0.png": b"x", "1.txt": b"A circle.", "1.png": (data / "b.png").read_bytes()}
    with tarfile.open(data / "a.tar", "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    arguments = ["--tokenizer", data / "tokenizer.model", "--config", "stage4_instruct:tiny", "--out", data / "stats"]
    assert run("stats", data / "a.tar", *arguments) == 0
    stats = json.loads((data / "stats" / "stats.json").read_text())
    assert (stats["looked_at"], stats["skipped"]) == (2, 1)


def test_show(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tokenizer", data / "tokenizer.model", "--config", "stage4_instruct:tiny", "--out", data / "s.png"]
    assert run("show", 0, data / "train.jsonl", *arguments) == 0
    assert "sample s0" in capsys.readouterr().out
    assert Image.open(data / "s.png").width == 1280
    assert run("show", 3, data / "train.jsonl", *arguments) == 2
    assert "there is no sample 3; there are 3" in capsys.readouterr().err


def test_build_then_train_from_it(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorflow_datasets")
    assert run("build", data / "train.jsonl", "--name", "small", "--out", data / "sets", "--shard-samples", 2) == 0
    file = AnnotationFile(data / "sets" / "small" / "1.0.0")
    assert [file[i].id for i in range(3)] == ["s0", "s1", "s2"]
    assert run("check", data / "sets" / "small" / "1.0.0", "--report", data / "r.jsonl") == 0
    assert "2 media" in capsys.readouterr().out
    assert run("build", data / "train.jsonl", "--name", "a b", "--out", data) == 2


def test_check_names_all_wrong_records_and_goes_on(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = [{"from": "human", "value": "<video>Q"}, {"from": "gpt", "value": ""}]
    good = {"video": "a.mp4", "conversations": talk}
    wrong = [{"video": "a.mp4"}] * 24 + [good | {"id": "late", "start": 30, "end": 40}]
    names = [good | {"id": "half \ud83d", "video": "latin-\udce9.mp4"}, good | {"video": "half\ud83d.mp4"}, good]
    lines = [json.dumps(record) for record in [*wrong, *names]] + ['{"a": ' * 50_000, '{"id": ' + "9" * 5000 + "}"]
    (data / "bad.jsonl").write_text("\n".join(lines))
    report = data / "r.jsonl"
    assert run("check", data / "bad.jsonl", "--report", report) == 1
    out = capsys.readouterr().out
    assert out.count("bad.jsonl, line") == 20 and "27 of 30 records are wrong, the first 20 are above" in out
    assert "3 media" in out and "2 bad" in out and "latin-\\udce9.mp4: no such file" in out
    assert "note: 4 records: an answer is empty" in out
    assert [json.loads(line)["path"] for line in report.read_bytes().splitlines()][1].endswith("latin-\udce9.mp4")
    (data / "late.jsonl").write_text(json.dumps(good | {"id": "late", "start": 30, "end": 40}))
    assert run("check", data / "late.jsonl", "--report", report) == 1
    assert "sample 'late'" in (out := capsys.readouterr().out) and "no video between start 30 s and end 40 s" in out
    (data / "long.jsonl").write_text(
        "".join(json.dumps(good | {"duration": seconds}) + "\n" for seconds in (5.2, 8, 6))
    )
    assert run("check", data / "long.jsonl", "--report", report) == 1
    out = capsys.readouterr().out
    assert out.count("'duration' is") == 2 and "'duration' is 8 s, but" in out and "a.mp4 is 5" in out


def test_names_and_texts_that_utf8_cannot_hold(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorflow_datasets")
    (data / os.fsdecode(b"latin-\xe9.mp4")).write_bytes((data / "a.mp4").read_bytes())
    talk = [{"from": "human", "value": "<video>half \ud83d"}, {"from": "gpt", "value": "half \ud83d"}]
    record = {"id": "x\ud83d", "video": os.fsdecode(b"latin-\xe9.mp4"), "conversations": talk}
    (data / "odd.jsonl").write_text(json.dumps(record))
    assert run("check", data / "odd.jsonl", "--report", data / "r.jsonl") == 0
    for embed in ("true", "false"):
        built = ["--name", f"odd_{embed}", "--out", data / "sets", "--embed", embed]
        assert run("build", data / "odd.jsonl", *built) == 0
        (sample,) = read_conversations([data / "sets" / f"odd_{embed}" / "1.0.0"])
        assert sample.turns[1].text.startswith("half") and probe(sample.media[0].path, "video").seconds == 5.0
    arguments = ["--tokenizer", data / "tokenizer.model", "--config", "stage4_instruct:tiny", "--out", data / "s.png"]
    assert run("show", 0, data / "odd.jsonl", *arguments) == 0


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check") == 2
    assert run("check", "missing.jsonl") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 2 and "missing.jsonl: cannot read the annotations" in error
