"""Each benchmark from its official files: what is asked, about which file, with which words, and what is refused."""

import contextlib
import csv
import itertools
import json
import pickle

import pyarrow.parquet as pq
import pytest
from PIL import Image

from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.benchmarks.question import PROTOCOLS
from kangaroo_jax.evaluation.benchmarks.quickstart import read_file
from kangaroo_jax.evaluation.benchmarks.subtitles import NONE, on_display
from kangaroo_jax.evaluation.benchmarks.table import BENCHMARKS, benchmark_named
from kangaroo_jax.evaluation.checking import check, describe, questions_of, report
from kangaroo_jax.evaluation.marking import mark
from tests.evaluation.layouts import COLOURS, LAYOUTS

WITH_FAULTS = {"mlvu": 2}  # the answer is none of the options; an option stands there twice
HIDDEN = {"mlvu-test": 1, "longvideobench-test": 2, "egoschema": 1}


def test_every_benchmark_has_a_layout():
    assert set(LAYOUTS) == set(BENCHMARKS)


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_a_layout_is_read_whole(name, data):
    benchmark = BENCHMARKS[name]
    questions = questions_of(benchmark, data(name))
    found = check(benchmark, questions, tell=lambda line: None)
    assert (found.questions, found.missing, found.broken, found.twice) == (LAYOUTS[name][1], (), (), ())
    assert len(found.faults) == WITH_FAULTS.get(name, 0) and found.hidden == HIDDEN.get(name, 0)
    for question in questions:
        assert question.options or question.kind in ("open", "exact")
        assert (
            question.answer is None
            or question.fault
            or question.kind in ("open", "exact")
            or (question.answer in question.letters and len(question.answer) == 1)
        )
        assert not benchmark.average or len(question.groups[benchmark.average]) == 1
        for style in benchmark.wordings:
            told = benchmark.wording(style, question.kind).prompt(question, "(said)")
            assert question.text in told and "{" not in told
    assert set(benchmark.readings) <= set(PROTOCOLS)
    assert describe(benchmark)[0].startswith(benchmark.title)


def asked(name, data, style, number=0):
    benchmark = BENCHMARKS[name]
    question = questions_of(benchmark, data(name))[number]
    wording = benchmark.wording(style, question.kind)
    return wording.system, wording.prompt(question, "SAID"), wording.prefill


OPTIONS = "\n".join(f"{letter}. {colour}" for letter, colour in zip("ABCD", COLOURS, strict=True))
BRACKETS = "\n".join(f"({letter}) {colour}" for letter, colour in zip("ABCD", COLOURS, strict=True))
BEST = f"Question: Which?\nOptions:\n{BRACKETS}\nOnly give the best option."
DIRECTLY = "Answer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    ("name", "style", "number", "prompt", "prefill"),
    [
        ("mvbench", "lmms-eval", 0, f"Question:Which?\nOption:\n{BRACKETS}\nOnly give the best option.\n", ""),
        (
            "mvbench",
            "official",
            0,
            f"Question: Which?\nOptions:\n{BRACKETS}\nOnly give the best option.",
            "Best option:(",
        ),
        ("mlvu", "lmms-eval", 0, f"Which?\n{BRACKETS}\nOnly give the best option.\nBest option: (", ""),
        (
            "mlvu",
            "official",
            0,
            f"Question: Which?\nOptions:\n{BRACKETS}\nOnly give the best option.",
            "Best Option: (",
        ),
        (
            "video-mme",
            "lmms-eval",
            0,
            "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
            "Respond with only the letter (A, B, C, or D) of the correct option.\n"
            f"Which 0?\n{OPTIONS}\n\n{DIRECTLY}",
            "",
        ),
        (
            "video-mme-subtitles",
            "official",
            0,
            "This video's subtitles are listed below:\nSAID\n"
            "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
            "Respond with only the letter (A, B, C, or D) of the correct option.\n"
            f"Which 0?\n{OPTIONS}\nThe best answer is:",
            "",
        ),
        ("lvbench", "lmms-eval", 0, f"What comes first?\n{BRACKETS}\nAnswer the question with the option letter", ""),
        ("seed-bench-2", "official", 0, "Which?", ""),
        ("egoschema", "lmms-eval", 0, f"Which?\n{OPTIONS}\nE. black\n{DIRECTLY}", ""),
        ("longvideobench", "official", 0, f"Question: Which?\nA. red\nB. blue\nC. green\n{DIRECTLY}", ""),
        ("longvideobench", "before", 0, f"SAID\nQuestion: Which?\nA. red\nB. blue\nC. green\n{DIRECTLY}", ""),
        ("longvideobench", "lmms-eval", 1, f"Which?\n{OPTIONS}\n{DIRECTLY}\n", ""),
        ("tempcompass", "official", 0, "Which?\nA. red\nB. blue\nPlease directly give the best option:", ""),
        ("tempcompass", "official", 3, "Does it grow?\nPlease answer yes or no:", ""),
        (
            "tempcompass",
            "official",
            6,
            "Which caption?\nCaption A: It grows.\nCaption B: It shrinks.\nPlease directly give the best option:",
            "",
        ),
        ("videovista", "official", 0, f"Which?\nOptions:\n{BRACKETS}\n{DIRECTLY}", ""),
        ("videovista-culturallingo", "official", 1, f"哪个?\n选项:\n{OPTIONS}\nAnswer:", ""),
        ("vnbench", "official", 0, f"Which?\n{OPTIONS}\n{DIRECTLY}", ""),
        ("mmbench-video", "official", 0, "What\nhappens?", ""),
        ("quickstart", "official", 0, "Which colour?", ""),
    ],
)
def test_a_question_is_put_in_the_words_of_the_protocol(name, style, number, prompt, prefill, data):
    assert asked(name, data, style, number)[1:] == (prompt, prefill)


def test_both_layouts_of_mvbench(data, maker):
    from kangaroo_jax.evaluation.benchmarks.mvbench import TASKS

    by_task = {q.groups["task"][0]: q.media[0] for q in questions_of(BENCHMARKS["mvbench"], data("mvbench"))}
    assert (by_task["action_sequence"].start, by_task["action_sequence"].end) == (1.0, 2.5)
    frames = by_task["episodic_reasoning"]
    assert (frames.sample_fps, frames.start) == (3.0, 1.0) and frames.path.endswith("frames_fps3_hq/a")
    for task, (cut, _) in TASKS.items():  # lmms-eval's: clips that are cut
        maker.video(f"{cut[0]}/a.mp4")
        row = {"video": "a.mp4", "question": "Which?", "candidates": COLOURS, "answer": "red", "start": 1.0, "end": 2.5}
        maker.write(f"json/{task}.json", [row])
    for question in questions_of(BENCHMARKS["mvbench"], maker.folder):
        assert question.media[0].start is None and "/json/" not in question.video


def test_segments_of_seed_bench_are_seconds(data):
    clips = [q.media[0] for q in questions_of(BENCHMARKS["seed-bench-1"], data("seed-bench-1"))]
    assert [(clip.start, clip.end) for clip in clips] == [(None, None), (0.5, 2.0), (1.0, 2.0)]
    first = questions_of(BENCHMARKS["seed-bench-2"], data("seed-bench-2"))
    assert [q.groups["dimension"] for q in first] == [("GVU",), ("AR",), ("AP",), ("PU",)]
    assert len(first[0].media[0].frames) == 8


def test_subtitles_on_display(data):
    folder = data("video-mme") / "video-mme" / "subtitle"
    assert on_display(str(folder / "id0.srt"), [0.5, 2.0]) == "the first"
    assert on_display(str(folder / "id0.srt"), [1.0, 2.0]) == NONE and on_display(str(folder / "no.srt"), [0.5]) == NONE
    said = data("longvideobench") / "longvideobench" / "subtitles"
    assert on_display(str(said / "v0_en.json"), [0.5, 1.0]) == "in the middle"
    assert on_display(str(said / "v0_en.json"), [0.5]) == NONE  # strictly inside
    assert on_display(str(said / "v1_en.json"), [0.0, 2.0], 10.0) == "to the end"


def changed(folder, name, change):
    """Change the value of a JSON file."""
    path = folder / name
    value = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(value) or value), encoding="utf-8")


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def without(name):
    """A change that takes a column away from every row."""
    return lambda rows: [{key: value for key, value in row.items() if key != name} for row in rows]


def unanswered(value):
    del value["questions"][0]["answer"]


def without_options(folder):
    path = next(folder.glob("*/*.parquet"))
    pq.write_table(pq.read_table(path).drop_columns(["options"]), path)


TASK, VAL = "json/state_change.json", "lvb_val.json"
SEED, EGO, VISTA = "SEED-Bench_v2_level1_2_3.json", "subset_answers.json", "VideoVista.json"


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("mvbench", lambda f: changed(f, TASK, without("candidates")), "item 1: has no candidates, only"),
        ("mvbench", lambda f: (f / TASK).unlink(), "there is no json/state_change.json or"),
        ("video-mme", lambda f: cut(f / "videomme/test-00000-of-00001.parquet"), "not a readable Parquet file"),
        ("video-mme", without_options, "row 1: has no options"),
        ("mlvu", lambda f: cut(f / "MLVU/json/1_plotQA.json"), "not JSON"),
        ("lvbench", lambda f: cut(f / "video_info.meta.jsonl", 0.9), "line 2: not JSON"),
        ("videovista", lambda f: changed(f, VISTA, lambda rows: [rows[0] | {"Answer": 7}]), "Answer is 7"),
        ("seed-bench-2", lambda f: changed(f, SEED, unanswered), "has no answer"),
        ("egoschema", lambda f: (f / EGO).unlink(), "there is no subset_answers.json"),
        ("egoschema", lambda f: changed(f, EGO, lambda v: {"uid0": 9}), "the answer of uid0 is 9"),
        ("longvideobench", lambda f: changed(f, VAL, without("correct_choice")), "has no correct_choice"),
        ("tempcompass", lambda f: changed(f, "questions/yes_no.json", lambda v: [1]), "expected an object of videos"),
        (
            "vnbench",
            lambda f: changed(f, "VNBench-main-4try.json", lambda v: {"rows": v}),
            "expected a list of questions",
        ),
        ("quickstart", lambda f: (f / "corpus/eval_short.jsonl").write_text('{"id": 1}\n'), "eval_short.jsonl, line 1"),
    ],
)
def test_bad_files_are_one_line(name, spoil, message, maker):
    LAYOUTS[name][0](maker)
    spoil(maker.folder)
    with pytest.raises(UserError) as raised:
        questions_of(BENCHMARKS[name], maker.folder)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def first_row(value):
    """The first question of a JSON file, or the object that holds all."""
    while not isinstance(value, dict) or (
        inner := [v for v in value.values() if isinstance(v, list) and len(value) == 1]
    ):
        value = value[0] if isinstance(value, list) else inner[0]
    return value


@pytest.mark.parametrize("name", [name for name in LAYOUTS if not name.startswith("needle")])
def test_a_field_of_another_kind_is_read_or_one_line(name, maker):
    LAYOUTS[name][0](maker)
    benchmark, by_keys = BENCHMARKS[name], {}
    for path in [*maker.folder.rglob("*.json"), *maker.folder.rglob("*.jsonl")]:
        head, *rest = path.read_text(encoding="utf-8").splitlines()  # of JSON all stands in the first line
        by_keys[tuple(first_row(json.loads(head)))] = path, head, rest  # one of each kind of file
    for keys, (path, head, rest) in by_keys.items():
        for key, bad in itertools.product(keys, (None, 7, "x", [], [None], {"a": 1}, True)):
            value = json.loads(head)
            first_row(value)[key] = bad
            path.write_text("\n".join([json.dumps(value), *rest]), encoding="utf-8")
            with contextlib.suppress(UserError):
                for question in questions_of(benchmark, maker.folder):
                    for protocol in PROTOCOLS:
                        mark(benchmark, question, {"text": "A"}, protocol)
        path.write_text("\n".join([head, *rest]), encoding="utf-8")


def test_a_table_with_a_line_break_in_a_field(maker):
    LAYOUTS["mmbench-video"][0](maker)
    path = maker.folder / "MMBench-Video.tsv"
    head, *rows = csv.reader(path.open(newline="", encoding="utf-8"), delimiter="\t")
    path.write_text("\n".join("\t".join(row) for row in (head, *rows)), encoding="utf-8")  # without quotes
    with pytest.raises(UserError, match=r"line 2: 4 of 6 fields; a field with a line break in it needs quotes"):
        questions_of(BENCHMARKS["mmbench-video"], maker.folder)


class Runs:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('it ran')",))


def test_pickles_are_refused_and_never_loaded(maker):
    LAYOUTS["mmbench-video"][0](maker)
    (maker.folder / "video" / "abc.mp4").rename(maker.folder / "abc.mp4")
    (maker.folder / "video").rmdir()
    (maker.folder / "video_pkl").mkdir()
    (maker.folder / "video_pkl" / "video_chunk_0.pkl").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(UserError, match=r"video_chunk_0.pkl is a pickle, which can run code and is never loaded"):
        questions_of(BENCHMARKS["mmbench-video"], maker.folder)


def test_the_image_of_a_question_stands_behind_the_video(maker):
    LAYOUTS["videovista"][0](maker)
    kind = {"Type": "Relation Reasoning-Image"}
    changed(maker.folder, VISTA, lambda rows: [rows[0] | kind | {"image_name": "who.jpg"}, rows[1] | kind])
    benchmark = BENCHMARKS["videovista"]
    first, second = questions_of(benchmark, maker.folder)
    assert [medium.kind for medium in first.media] == ["video", "image"] and first.video == first.media[0].path
    assert first.media[1].path == str(maker.folder / "relation_images" / "who.jpg") and first.groups["part"]
    found = check(benchmark, [first, second], tell=lambda line: None)
    assert found.missing == (first.media[1].path,) and len(second.media) == 1
    (fault,) = found.faults
    assert "item 2: asks about an image, but has no image_name" in fault


def test_a_check_names_what_is_missing_broken_or_at_fault(maker):
    LAYOUTS["mlvu"][0](maker)
    base = maker.folder / "MLVU" / "video"
    (base / "1_plotQA" / "v.mp4").unlink()
    cut(base / "2_needle" / "v.mp4")
    (base / "3_ego" / "v.mp4").write_bytes(pickle.dumps({"a": b"b"}))
    benchmark = BENCHMARKS["mlvu"]
    found = check(benchmark, questions_of(benchmark, maker.folder), tell=lambda line: None)
    assert [path.split("/")[-2] for path in found.missing] == ["1_plotQA"] and len(found.broken) == 2
    assert [fault.split(": ")[1] for fault in found.faults] == [
        "the answer is none of the options",
        "an option stands there twice",
    ]
    lines = report(benchmark, found)
    assert lines[0] == "mlvu: 11 questions (it has 2,593), about 9 media" and not found.complete
    assert lines[-1] == "  1 missing, 2 broken, 2 questions at fault" and len(lines) == 7


def test_names():
    with pytest.raises(UserError, match=r"no benchmark 'mvbensh' \(did you mean 'mvbench'\?\); there are mvbench, "):
        benchmark_named("mvbensh")
    assert benchmark_named("mine/held_out.jsonl").name == "held_out"


@pytest.mark.parametrize("there", ["data", "mine", "data mine", ""])
def test_a_file_of_ones_own_has_its_media_in_the_folder_given_or_beside_it(tmp_path, monkeypatch, there):
    row = {"id": "a", "image": "media/a.png", "answer": "red"}
    row["conversations"] = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    for folder in ("data", "mine"):
        (tmp_path / folder / "media").mkdir(parents=True)
        if folder in there:
            Image.new("RGB", (8, 8)).save(tmp_path / folder / "media" / "a.png")
    (tmp_path / "mine" / "own.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path / "mine")
    (question,) = questions_of(benchmark_named("own.jsonl"), tmp_path / "data")
    where = "mine" if there == "mine" else "data"
    assert question.media[0].path == str(tmp_path / where / "media" / "a.png")
    (tmp_path / "own.jsonl").symlink_to(tmp_path / "mine" / "own.jsonl")
    (question,) = read_file(tmp_path / "own.jsonl")
    assert question.media[0].path == str(tmp_path / "media" / "a.png"), "beside the link"
