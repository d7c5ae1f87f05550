"""Scores of planted answers by hand, under every protocol: right, wrong, verbose, empty, ambiguous, missing."""

import json

import pytest

from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.benchmarks.table import BENCHMARKS
from kangaroo_jax.evaluation.checking import questions_of
from kangaroo_jax.evaluation.model_page import write_model_page
from kangaroo_jax.evaluation.prompting import rotated, tasks_of
from kangaroo_jax.evaluation.report import heat_maps
from kangaroo_jax.evaluation.results import compare_runs, marked_answers, result_of, write_scored, write_submission
from kangaroo_jax.evaluation.samples import Samples


class Planted:
    """Answers that stand for those of a run: a text, what is likeliest (a list of losses), or why there is none."""

    def __init__(self, name: str, said, variant: str = "", weights: str = "w") -> None:
        self.latest = {}
        for id_, told in said.items():
            row = {"benchmark": name, "variant": variant, "id": id_, "style": "s", "key": id_, "text": ""}
            row |= {"identity": {"weights": weights}}
            if isinstance(told, list):
                row["losses"] = told
            elif told in ("media", "request"):
                row = {key: row[key] for key in row if key != "identity"} | {"failure": {"kind": told, "reason": "x"}}
            else:
                row["text"] = told
            self.latest[name, variant, id_] = row


def result(name, data, texts):
    """The result of a benchmark whose questions are answered by these texts, in their order; None is not asked."""
    questions = questions_of(BENCHMARKS[name], data(name))
    said = {question.id: text for question, text in zip(questions, texts, strict=True) if text is not None}
    return result_of(BENCHMARKS[name], questions, Planted(name, said), {})


def scores(found):
    return {name: round(one["score"], 4) for name, one in found["protocols"].items()}


def test_video_mme(data):
    # truth: B D B D B D
    texts = ["B. blue", "The answer is D", "<think>Is it A?</think> B", "", "It is Blue (B)", "media"]
    found = result("video-mme", data, texts)
    # official and VLMEvalKit read the A of a thought and the B of Blue; the official script leaves two answers out.
    assert scores(found) == {"strict": 0.6667, "official": 0.6, "lmms-eval": 0.6667, "vlmevalkit": 0.5}
    assert found["protocols"]["strict"]["unread"] == 1 and found["protocols"]["strict"]["media"] == 1
    assert found["protocols"]["strict"]["counted"] == 6 and found["protocols"]["official"]["counted"] == 5
    assert found["spread"] == pytest.approx(0.6667 - 0.5, abs=1e-3) and found["chance"] == 0.25
    assert found["groups"]["duration"]["short"] == {"score": 1.0, "questions": 2}


def test_mvbench_averages_tasks_and_knows_the_prefill(data):
    # truth: A and B in each of 20 tasks
    texts = ["A) red", "B) blue"] * 10 + ["", "blue"] * 10
    found = result("mvbench", data, texts)
    # the official script finds the empty answer in "(a)"; lmms-eval leaves it out; VLMEvalKit infers from "blue"
    assert scores(found) == {"strict": 0.5, "official": 0.75, "lmms-eval": 0.5, "vlmevalkit": 1.0}


def test_mlvu_is_the_mean_of_tasks_and_its_generation_is_not_judged(data):
    # truth: A in each of seven tasks; count has two more, whose key is wrong or doubled; then two for a judge
    texts = ["A) red", "A", "A.", "A", "B", "A", "A", "the letter A", "A) red", "A ring.", "request"]
    found = result("mlvu", data, texts)
    one = found["protocols"]["strict"]
    assert one["unjudged"] == 2 and one["counted"] == 9
    assert found["faults"] == 2
    assert scores(found)["strict"] == pytest.approx((6 + 2 / 3) / 7, abs=1e-3)  # count: right, impossible, right
    assert scores(found)["official"] == pytest.approx((4 + 2 / 3) / 7, abs=1e-3)  # not "A.", nor words


def test_seed_takes_the_likeliest_option(data):
    found = result("seed-bench-2", data, [[2.0, 1.5, 0.5, 3.0], [0.1, 1.0, 0.5, 2.0], "C", "media"])
    assert scores(found) == {"strict": 0.5, "lmms-eval": 0.5}  # truth: C


def test_a_guess_of_a_harness_is_worth_its_chance(data):
    found = result("longvideobench", data, ["no idea", "B"])  # truth: B of three, B of four
    assert scores(found) == {"strict": 0.5, "official": 0.6667, "lmms-eval": 0.6667, "vlmevalkit": 0.5}
    assert found["protocols"]["strict"]["unread"] == 1 == found["protocols"]["official"]["unread"]


def test_tempcompass_weighs_questions_of_all_formats(data):
    choice, yes_no, matching = (
        ["B", "B. blue", "It is blue (B)"],
        ["No", "no, it is not", "nope"],
        ["Caption B", "It shrinks.", "A"],
    )
    found = result("tempcompass", data, [*choice, *yes_no, *matching, "a", "b", "c"])
    one = found["protocols"]["strict"]
    assert one["unjudged"] == 3 and one["counted"] == 9 and one["unread"] == 1
    assert scores(found)["strict"] == pytest.approx(7 / 9, abs=1e-3)
    assert scores(found)["official"] == pytest.approx(7 / 9, abs=1e-3)  # reads "nope" as no, but no verbose letter


def test_vnbench_counts_a_unit_once_and_right_only_if_all_are(data):
    # red stands at A, D, C, B in the four orders
    found = result("vnbench", data, ["A", "D", "C", "B"] + ["A", "D", "C", "C"] + ["A", "D", None, "B"])
    one = found["protocols"]["strict"]
    assert (one["counted"], one["unasked"]) == (3, 1) and scores(found)["strict"] == pytest.approx(1 / 3, abs=1e-3)
    assert found["chance"] == pytest.approx(0.25**4, abs=1e-6)


def test_needles_are_found_only_in_all_orders_and_shown_apart(data):
    benchmark = BENCHMARKS["needle"]
    questions = questions_of(benchmark, data("needle"))
    assert sum(q.groups["mode"] == ("none",) for q in questions) == 4 * 24
    planted = Planted("needle", {q.id: q.answer for q in questions})
    for question in questions:
        row = planted.latest["needle", "", question.id]
        row["frame_times"] = [question.media[0].times[:: 8 if question.groups["mode"] == ("clip",) else 1]]
        if question.groups["length"] == ("60 s",) and question.groups["depth"] == ("40%",) and question.id[-1] == "2":
            row["text"] = "none of them"
        if question.groups["length"] == ("3600 s",):
            row["frame_times"] = [[0.0, 1.0]]
    found = result_of(benchmark, questions, planted, {})
    cells = {(c["mode"], c["length"], c["depth"]): (c["shown"], c["found"]) for c in found["needles"]}
    assert cells["frame", "16 frames", "20%"] == (1.0, 1.0) and cells["clip", "60 s", "40%"] == (1.0, 0.0)
    assert cells["clip", "3600 s", "0%"] == (1.0, 1.0) and cells["clip", "3600 s", "100%"] == (0.0, 1.0)
    assert cells["none", "64 frames", "none"] == (0.0, 1.0) and len(cells) == 5 * 6 + 4 * 6 + 1
    assert (
        found["protocols"]["strict"]["counted"] == 78
        and found["videos"] == 55
        and found["chance"] == pytest.approx(1 / 256, abs=1e-6)
    )
    (maps, *_) = heat_maps(found["needles"])
    assert maps[:2] == ("frame", [f"{count} frames" for count in (16, 32, 64, 128, 160)]) and len(maps[2]) == 6


FIRST_NEEDLES = ["yellow", "yellow", "white", "green", "purple"]


def test_needles_are_asked_when_they_appear_with_four_moments(data):
    benchmark = BENCHMARKS["needle-time"]
    questions = questions_of(benchmark, data("needle-time"))
    by_unit = {q.unit: [one for one in questions if one.unit == q.unit] for q in questions}
    for some in by_unit.values():
        assert {q.answer for q in some} == set("ABCD") and len(set(some[0].options)) == 4
        told = {int(q.options["ABCD".index(q.answer)].removesuffix(" seconds")) for q in some}
        assert len(told) == 1 and (not some[0].row["needle"] or abs(told.pop() - some[0].row["needle"][0]) <= 0.5)
    colours = questions_of(BENCHMARKS["needle"], data("needle"))
    assert [(q.id, q.media[0].times, q.row) for q in questions] == [(q.id, q.media[0].times, q.row) for q in colours]
    assert [q.options[0] for q in colours[:20:4]] == FIRST_NEEDLES  # scores of other days are of the same questions
    by_mode = {
        mode: [some[0] for some in by_unit.values() if f"/{mode}/" in some[0].unit] for mode in ("frame", "none")
    }
    assert len({one.options[0] for one in by_mode["none"]}) == 6  # no habit of one moment is right there
    others = {option for one in by_mode["frame"] if "/160/" in one.unit for option in one.options[1:]}
    assert len(others) == 6  # every moment is an option where it is not the answer
    found = result_of(benchmark, questions, Planted("needle-time", {q.id: q.answer for q in questions}), {})
    none = [c for c in found["needles"] if c["mode"] == "none"]
    assert len(found["needles"]) == 5 * 6 + 4 * 6 + 1 and [c["needles"] for c in none] == [24]
    wording = benchmark.wording("plain", "choice").prompt(questions[0])
    assert "At which second does it appear?\nA. 0 seconds\nB. " in wording


def test_the_others(data):
    assert scores(result("lvbench", data, ["A", "(B)", "C. green", "B", "Answer B", "c"])) == {
        "strict": 0.8333,
        "official": 0.5,  # of "Answer B" the A; "c" is no letter
        "lmms-eval": 0.6667,
    }
    assert scores(result("egoschema-subset", data, ["(E) black", "It is red, I think, and no other"])) == {
        "strict": 0.5,
        "lmms-eval": 1.0,
    }
    assert scores(result("videovista", data, ["(A) red", "B. blue"])) == {"strict": 1.0, "official": 0.5}
    assert scores(result("videovista-culturallingo", data, ["A", "答案是B"])) == {"strict": 1.0, "official": 0.5}
    assert scores(result("seed-bench-1", data, ["C. green", "(C)", "c"])) == {"strict": 1.0, "lmms-eval": 0.3333}
    assert scores(result("quickstart", data, ["B", "A", "a blue"])) == {"strict": 0.6667}
    judged = result("mmbench-video", data, ["A ring.", "Nobody."])["protocols"]["strict"]
    assert (judged["unjudged"], judged["counted"]) == (2, 0)


def test_hidden_answers_are_no_score_but_a_submission(data, tmp_path):
    for name, said, told in (
        ("mlvu-test", ["A) red"], [{"question_id": "AR_0", "question_type": "anomaly_reco", "option": "A"}]),
        ("longvideobench-test", ["B", "no idea"], {"v0_0": "B", "v1_0": ""}),
        ("egoschema", ["E", "B", "none"], {"uid0": 4, "uid1": 1, "uid2": -1}),
    ):
        benchmark = BENCHMARKS[name]
        questions = questions_of(benchmark, data(name))
        planted = Planted(name, dict(zip([q.id for q in questions], said, strict=True)))
        hidden = result_of(benchmark, questions, planted, {})["protocols"]["strict"]
        assert (
            hidden["hidden"] == sum(q.answer is None for q in questions)
            and hidden["counted"] == len(questions) - hidden["hidden"]
        )
        path = write_submission(tmp_path, benchmark, marked_answers(benchmark, questions, planted))
        assert json.loads(path.read_text()) == told


def test_other_submissions(data, tmp_path):
    for name, said in (("video-mme", "B"), ("lvbench", "B"), ("videovista", "B")):
        benchmark = BENCHMARKS[name]
        questions = questions_of(benchmark, data(name))
        planted = Planted(name, {q.id: said for q in questions})
        path = write_submission(tmp_path, benchmark, marked_answers(benchmark, questions, planted))
        value = json.loads(path.read_text())
        if name == "video-mme":
            assert [len(video["questions"]) for video in value] == [2, 2, 2]
            first = {"question_id": "000-0", "task_type": "Counting Problem", "answer": "B", "response": "B"}
            assert value[0]["questions"][0] == first and value[0]["duration_category"] == "short"
        elif name == "lvbench":
            assert set(value.values()) == {"B"} and len(value) == 6
        else:
            assert [row["Model_Answer"] for row in value] == ["B", "B"] and value[0]["Type"] == "Action Count"


def test_controls_are_paired_and_say_what_the_video_adds(data):
    benchmark = BENCHMARKS["videovista"]
    questions = questions_of(benchmark, data("videovista"))  # truth: A, B
    planted = Planted("videovista", {"0": "A", "1": "B"})
    planted.latest |= Planted("videovista", {"0": "A", "1": "A"}, "no-video").latest
    planted.latest |= Planted("videovista", {"0": "C", "1": "A"}, "rotated").latest  # of red at C, blue at D
    controls = result_of(benchmark, questions, planted, {})["controls"]
    assert controls["no-video"] | {"adds_low": 0, "adds_high": 0} == {
        "score": 0.5, "questions": 2, "adds": 0.5, "adds_low": 0, "adds_high": 0, "right_in_both": 0.5
    }  # fmt: skip
    assert controls["rotated"]["score"] == 0.5 and "one-frame" not in controls


def test_rotated_options_move_their_letter(data):
    question = questions_of(BENCHMARKS["longvideobench"], data("longvideobench"))[0]
    turned = rotated(question)
    assert turned.options == ("green", "red", "blue") and turned.answer == "C" and question.answer == "B"


def test_answers_of_two_models_are_not_mixed(data):
    benchmark = BENCHMARKS["videovista"]
    questions = questions_of(benchmark, data("videovista"))
    planted = Planted("videovista", {"0": "A"})
    planted.latest |= Planted("videovista", {"1": "A"}, weights="other").latest
    with pytest.raises(UserError, match="its answers are of 2 weights; let the run finish first"):
        result_of(benchmark, questions, planted, {})


def test_two_runs_are_compared_by_question(data, tmp_path):
    benchmark = BENCHMARKS["video-mme"]
    questions = questions_of(benchmark, data("video-mme"))
    for name, said in (("a", "BDBDAA"), ("b", "BDBDBA")):
        (tmp_path / name).mkdir()
        planted = Planted("video-mme", dict(zip([q.id for q in questions], said, strict=True)))
        write_scored(tmp_path / name, [(benchmark, marked_answers(benchmark, questions, planted))])
    (line,) = compare_runs(tmp_path / "a", tmp_path / "b")
    assert line.startswith("video-mme (strict): the second has +16.7% (95%: ") and "better in 1, worse in 0" in line
    with pytest.raises(UserError, match="no workdir of a finished evaluation"):
        compare_runs(tmp_path, tmp_path / "b")


def test_an_unknown_style_is_refused(data):
    with pytest.raises(UserError, match="lvbench: has no prompts of 'official'; there are lmms-eval"):
        tasks_of(BENCHMARKS["lvbench"], [], "official")


def test_samples_survive_a_torn_line_and_refuse_another_writer(tmp_path):
    row = {"benchmark": "b", "variant": "", "id": "1", "key": "k", "text": "A"}
    with Samples(tmp_path) as samples:
        samples.add(row)
        samples.add({**row, "id": "2", "key": "l"})
        with pytest.raises(UserError, match="another evaluation is writing to it"):
            Samples(tmp_path)
    path = tmp_path / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    with Samples(tmp_path) as samples:
        assert list(samples.latest) == [("b", "", "1")] and samples.answer("l") is None
        samples.add({**row, "id": "2", "key": "l"})
    with Samples(tmp_path, "1-of-2") as samples:
        assert samples.answer("k") and samples.answer("l")
    path.write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="line 1: no answer of an evaluation"):
        Samples(tmp_path)


def test_a_whole_benchmark_has_a_file_for_a_models_page_and_a_part_of_one_has_none(data, tmp_path):
    benchmark = BENCHMARKS["video-mme"]
    found = result("video-mme", data, ["B", "D", "B", "D", "A", "A"])
    assert write_model_page(tmp_path, benchmark, found) is None  # 6 of 2,700 questions
    found["questions"] = 2690
    path = write_model_page(tmp_path, benchmark, found)
    (entry,) = json.loads(path.read_text())
    assert path == tmp_path / ".eval_results" / "video-mme.yaml"
    assert entry["dataset"] == {"id": "lmms-lab/Video-MME", "task_id": "default"} and entry["value"] == 66.67
    parse = pytest.importorskip("huggingface_hub", minversion="1.0").parse_eval_result_entries
    assert parse([entry])[0].value == 66.67
    partly = result("video-mme", data, ["B", "D", "B", "D", "A", None])
    partly["questions"] = 2700
    assert write_model_page(tmp_path, benchmark, partly) is None and not path.exists()
    none = {"unasked": 0, "counted": 0, "score": None}
    for other in ({"settings": {"limit": 6}}, {"protocols": {"strict": none}}):  # cut by hand; no answer is public
        assert (
            write_model_page(tmp_path, benchmark, found)
            and write_model_page(tmp_path, benchmark, found | other) is None
        )
    assert write_model_page(tmp_path, BENCHMARKS["quickstart"], found) is None
