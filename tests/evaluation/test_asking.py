"""A whole evaluation by a model with random weights: what is asked, once, and again where something has changed."""

import dataclasses
import json
import shutil
from collections import Counter

import numpy as np
import pytest

from kangaroo_jax.cli.main import main
from kangaroo_jax.data.media.video import MediaRef
from kangaroo_jax.evaluation.benchmarks.question import Question
from kangaroo_jax.evaluation.benchmarks.table import BENCHMARKS
from kangaroo_jax.evaluation.prompting import Task, parts_of
from kangaroo_jax.inference import compiled
from kangaroo_jax.inference.engine import Engine
from tests.evaluation.layouts import LAYOUTS, Maker


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint("float32")


@pytest.fixture
def asked(monkeypatch):
    """The requests that reach the engine, and its counts when it is closed."""
    requests, counts = [], Counter()
    submit, close = Engine.submit, Engine.close

    def submitted(self, request):
        requests.append(request)
        return submit(self, request)

    def closed(self, drain=0.0):
        counts.update(self.stats())
        close(self, drain)

    monkeypatch.setattr(Engine, "submit", submitted)
    monkeypatch.setattr(Engine, "close", closed)
    requests_and_counts = (requests, counts)
    return requests_and_counts


@pytest.fixture
def tickets(asked, monkeypatch):
    """The engine's tickets for the requests, in their order."""
    kept, submit = [], Engine.submit

    def submitted(self, request):
        kept.append(submit(self, request))
        return kept[-1]

    monkeypatch.setattr(Engine, "submit", submitted)
    return kept


def run(checkpoint, folder, workdir, name, *flags):
    words = [f"--checkpoint={checkpoint}", f"--benchmark={name}", f"--data={folder}", f"--workdir={workdir}"]
    assert main(["eval", *words, *flags]) == 0
    return json.loads((workdir / "results.json").read_text())["results"][0]


def lines(workdir):
    return [json.loads(line) for line in (workdir / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_video_is_read_once_for_all_its_questions(checkpoint, data, asked, tickets, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(compiled, "keep_programs", lambda: kept.append(True))
    requests, counts = asked
    found = run(checkpoint, data("lvbench"), tmp_path, "lvbench", "--max-new-tokens=4")
    rows = lines(tmp_path)
    assert len(requests) == len(rows) == 6 and found["protocols"]["strict"]["unread"] <= 6
    assert kept == [True], "the next run need not compile"
    frames, tokens = len(requests[0].media[0].times), int(requests[0].is_vision.sum())
    assert counts["frames_decoded"] == counts["frames_encoded"] == 2 * frames
    read = [int(r.is_vision[t.result().usage.cached_tokens :].sum()) for r, t in zip(requests, tickets, strict=True)]
    assert sum(read) == 2 * tokens, "exactly the vision tokens of the two videos were prefilled"
    # Vision tokens are read once a video; of other tokens what two questions do not share is read again.
    assert counts["tokens_cached"] >= 4 * tokens
    assert counts["tokens_prefilled"] <= sum(len(r.tokens) for r in requests) - 4 * tokens
    times = rows[0]["frame_times"][0]
    assert len(times) == frames and times == sorted(times)
    assert rows[0]["identity"]["times"][0][1:] == pytest.approx([t for t in requests[0].media[0].times], abs=1e-5)


def test_nothing_is_asked_twice_until_something_changes(checkpoint, make_checkpoint, template, asked, tmp_path, capsys):
    requests, _ = asked
    maker = Maker(tmp_path / "egoschema", template)
    maker.folder.mkdir()
    LAYOUTS["egoschema"][0](maker)
    workdir, here = tmp_path / "eval", tmp_path / "model"
    shutil.copytree(checkpoint, here)
    options = (here, tmp_path, workdir, "egoschema-subset", "--max-new-tokens=3", "--slots=1", "--at-a-time=1")
    (tmp_path / "egoschema").rename(tmp_path / "egoschema-subset")
    folder = tmp_path / "egoschema-subset" / "videos"
    first = run(*options)
    assert len(requests) == 2
    assert run(*options) == first and len(requests) == 2
    capsys.readouterr()
    (folder / "uid2.mp4").write_bytes((folder / "uid2.mp4").read_bytes() + b"\x00\x00\x00\x08free")  # other bytes
    run(*options)
    assert len(requests) == 3
    shutil.rmtree(here)
    shutil.copytree(make_checkpoint("bfloat16"), here)  # other weights at the same path
    run(*options)
    assert len(requests) == 5
    (folder / "uid0.mp4").rename(folder / "away.mp4")
    missing = run(*options)["protocols"]["strict"]
    assert len(requests) == 5 and missing["media"] == 1 and missing["counted"] == 2
    assert "uid0.mp4: no such file" in lines(workdir)[-1]["failure"]["reason"]
    assert run(*options)["protocols"]["strict"] == missing and len(lines(workdir)) == 6
    (folder / "away.mp4").rename(folder / "uid0.mp4")
    assert run(*options)["protocols"]["strict"]["media"] == 0 and len(requests) == 5


def test_likelihood_and_prefill_and_subtitles_and_controls(checkpoint, data, asked, tmp_path):
    requests, _ = asked
    found = run(checkpoint, data("seed-bench-2"), tmp_path / "seed", "seed-bench-2")
    assert len(requests) == 16 and all(request.continuation is not None for request in requests)
    assert [len(row["losses"]) for row in lines(tmp_path / "seed")] == [4] * 4
    assert found["protocols"]["strict"]["unread"] == 0 and found["protocols"]["strict"]["counted"] == 4
    del requests[:]
    run(checkpoint, data("mlvu-test"), tmp_path / "mlvu", "mlvu-test", "--max-new-tokens=2")
    tokens = requests[0].tokens
    assert len(requests) == 1
    del requests[:]
    controls = run(
        checkpoint, data("longvideobench"), tmp_path / "lvb", "longvideobench", "--controls", "--max-new-tokens=2"
    )
    assert len(requests) == 10 and set(controls["controls"]) == {"no-video", "one-frame", "shuffled", "rotated"}
    (request, *_) = [request for request in requests if request.media and request.media[0].frames]
    (shuffled,) = request.media
    order = [int(path.rpartition("/")[2].split(".")[0]) for path in shuffled.frames]
    assert sorted(order) == list(range(len(order))) != order and list(shuffled.times) == sorted(shuffled.times)
    gaps = np.diff(np.flatnonzero(request.is_vision))
    assert np.count_nonzero(gaps > 4) == 1 and np.count_nonzero(gaps == 2) == len(order) // 2 - 2  # one line between
    page = (tmp_path / "lvb" / "report.html").read_text(encoding="utf-8")
    assert "What the video adds" in page and "data:image/jpeg;base64," in page and "LongVideoBench (val)" in page
    by_media = Counter(len(set(request.media[0].times)) if request.media else 0 for request in requests)
    assert by_media[0] == 2 and by_media[1] == 2 and len(tokens) > 100


def test_subtitles_stand_between_the_frames(tmp_path):
    said = tmp_path / "said.json"
    rows = [([12.4, 13.6], "two"), ([10.9, 11.3], "one"), ([14.9, 19.0], "three"), ([30.0, 31.0], "never")]
    said.write_text(json.dumps([{"timestamp": span, "text": text} for span, text in rows]))
    question = Question("q", (), "", subtitles=str(said), subtitles_from=10.0)
    wording = BENCHMARKS["longvideobench"].wording("official", "choice")
    task = Task(BENCHMARKS["longvideobench"], question, wording, "official")
    video = MediaRef("video", "v.mp4", tuple(float(second) for second in range(8)))
    told = [part if isinstance(part, str) else part.times for part in parts_of(task, [video], 2)]
    assert told == [(0, 1), "one", (2, 3), "two", (4, 5, 6, 7), "three"]  # after the frames up to 1.1, 3.0 and 6.95
    shown = dataclasses.replace(video, times=(4.0, 5.0), start=2.0)  # a clip that begins at second 2
    assert [part for part in parts_of(task, [shown], 2) if isinstance(part, str)] == ["three"]
    plain = dataclasses.replace(task, wording=BENCHMARKS["longvideobench"].wording("lmms-eval", "choice"))
    assert list(parts_of(plain, [video], 2)) == [video]


def test_shares_are_put_together(checkpoint, data, asked, tmp_path, capsys):
    requests, _ = asked
    folder, flags = data("vnbench"), ("--max-new-tokens=2", "--limit=8")
    whole = run(checkpoint, folder, tmp_path / "whole", "vnbench", *flags)
    count = len(requests)
    for part in ("1/2", "2/2"):
        run(checkpoint, folder, tmp_path / "parts", "vnbench", *flags, f"--share={part}")
    assert len(requests) == 2 * count
    assert main(["eval", f"--workdir={tmp_path / 'parts'}", "--rescore"]) == 0
    assert json.loads((tmp_path / "parts" / "results.json").read_text())["results"] == [whole]
    assert len(requests) == 2 * count


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--checkpoint=x", "--benchmark=mvbench"), "eval: --data is missing (folder of the benchmarks' files"),
        (("--data=.", "--check"), "eval: --benchmark is missing"),
        (("--benchmark=mvbensh", "--data=.", "--check"), "no benchmark 'mvbensh' (did you mean 'mvbench'?)"),
        (("--benchmark=mvbench", "--data=/nowhere", "--check"), "--data=/nowhere: no such folder"),
        (("--benchmark=mvbench", "--data=.", "--workdir=w"), "eval: --checkpoint is missing"),
        (
            ("--benchmark=vnbench", "--data={data}", "--workdir={tmp}", "--checkpoint={tmp}"),
            "holds no finished checkpoint",
        ),
        (
            ("--benchmark=vnbench", "--data={data}", "--workdir={tmp}", "--checkpoint=x", "--share=3/2"),
            "no part like 2/4",
        ),
        (
            ("--benchmark=vnbench", "--data={data}", "--workdir={tmp}", "--checkpoint=x", "--prompt=x"),
            "has no prompts of",
        ),
        (("--rescore", "--workdir={tmp}"), "it is no workdir of an evaluation"),
        (("--compare", "a"), "--compare takes the workdirs of two runs, not 1"),
        (("--compare", "a", "b", "--protocol=x"), "--protocol=x: is none of strict, official"),
        (("--describe=x",), "no benchmark 'x'"),
    ],
)
def test_bad_flags_are_one_line(flags, words, data, tmp_path, capsys):
    given = [flag.format(data=data("vnbench"), tmp=tmp_path) for flag in flags]
    assert main(["eval", *given]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1


def test_describe_and_check(data, template, tmp_path, capsys):
    assert main(["eval", "--describe=all"]) == 0
    told = capsys.readouterr().out
    assert all(f"({name})" in told for name in LAYOUTS) and "nothing is downloaded" in told
    assert (
        main(["eval", "--benchmark=vnbench,lvbench", f"--data={data('vnbench') and data('lvbench')}", "--check"]) == 0
    )
    assert "0 missing, 0 broken" in capsys.readouterr().out
    maker = Maker(tmp_path, template)
    LAYOUTS["vnbench"][0](maker)
    (tmp_path / "videos" / "ord_edit.mp4").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["eval", "--benchmark=vnbench", f"--data={tmp_path}", "--check"])
    assert ended.value.code == 3 and f"missing: {tmp_path}/videos/ord_edit.mp4" in capsys.readouterr().out
