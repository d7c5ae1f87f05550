import collections
import dataclasses
import json
import random
import re

import av
import numpy as np
import pytest

from kangaroo_jax.corpus.conversations import write_records
from kangaroo_jax.corpus.draw import RGB, Painter, load_scans, split_scans
from kangaroo_jax.corpus.make import CorpusMixture, make_corpus, read_records
from kangaroo_jax.corpus.scenes import (
    CANVAS,
    COLOURS,
    DIGITS,
    DIRECTIONS,
    SHAPES,
    THINGS,
    SceneMaker,
    has_held_combination,
    held_colour,
    held_direction,
)
from kangaroo_jax.corpus.text import Phrasing, ask, caption, chinese_words, dense_caption, facts, middle_second, note
from kangaroo_jax.corpus.warmup import LESSONS
from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.benchmarks.needle import NEEDLE_TIME
from kangaroo_jax.evaluation.benchmarks.question import Question
from kangaroo_jax.evaluation.extraction.strict import extract_letter
from kangaroo_jax.quickstart.judging import phrasings
from kangaroo_jax.quickstart.report import FRAMES_SHOWN, pictures

KINDS = ("image", "image_aside", "image_count", "still", "count", "move", "order")
KINDS += ("recolour", "transform", "appear", "disappear", "long")
TINY = dataclasses.replace(
    CorpusMixture(),
    images=16,
    shorts=13,
    longs=2,
    held_images=6,
    held_shorts=13,
    held_longs=3,
    warmup=0.01,
    stage1_captions=20,
    stage1_more=6,
    some_images=5,
    some_text=6,
    stage5_again=8,
    short_fps=2,
    long_fps=1,
    eval_image=(8, 8),
    eval_short=(48, 24),
    eval_long=(16, 8),
)


def scenes(split, kind, count=60, seed=0):
    maker = SceneMaker(split, split_scans()["eval" if split == "eval" else "train"], random.Random(seed))
    return [maker.make(kind) for _ in range(count)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("work") / "corpus", 3, mixture=TINY, processes=1, tell=lambda line: None)


def test_scans_of_the_splits_are_disjoint_and_of_their_digit():
    split, (_, target) = split_scans(), load_scans()
    for digit in DIGITS:
        train, held = set(split["train"][digit]), set(split["eval"][digit])
        assert not train & held and len(train) > 3 * len(held) > 60
        assert {int(target[i]) for i in train | held} == {int(digit)}


@pytest.mark.parametrize("kind", KINDS)
def test_training_shows_no_held_out_combination(kind):
    for scene in scenes("train", kind):
        for event in scene.events:
            assert event.thing.colour != held_colour(event.thing.name)
            assert kind != "move" or scene.direction != held_direction(event.thing.name)
        assert not has_held_combination(scene)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_shows_held_out_scans_and_combinations(kind):
    held = {i for scans in split_scans()["eval"].values() for i in scans}
    shown = scenes("eval", kind)
    assert all(e.thing.scan in held for scene in shown for e in scene.events if e.thing.name not in SHAPES)
    assert sum(map(has_held_combination, shown)) >= 0.35 * len(shown)


def test_every_colour_and_direction_is_trained_on_with_most_things():
    held = collections.Counter(held_colour(name) for name in THINGS)
    assert set(held) == set(COLOURS) and max(held.values()) <= 3
    assert {held_direction(name) for name in THINGS} == set(DIRECTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_events_lie_in_the_scene_and_on_the_canvas(kind):
    for scene in scenes("train", kind):
        assert all(0 <= e.start <= e.end <= scene.seconds for e in scene.events)
        assert all(0 < v < CANVAS for e in scene.events for v in (e.x0, e.y0, e.x1, e.y1))
        if kind in ("order", "transform", "long"):
            assert len({e.thing.name for e in scene.events}) == len(scene.events)
            assert len({e.thing.colour for e in scene.events}) == len(scene.events)
        if kind in ("order", "transform", "long"):
            for event in scene.events:
                assert scene.seen(middle_second(scene, event)) == (event,)


def test_long_events_last_6_to_8_seconds_and_stand_apart():
    for scene in scenes("train", "long"):
        assert 65 <= scene.seconds <= 160
        assert all(6 <= e.end - e.start <= 8 for e in scene.events)
        for a, b in zip(scene.events, scene.events[1:], strict=False):
            assert b.start - a.end >= 10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_questions_are_answerable_from_the_words(kind, language):
    rng = random.Random(1)
    for scene in scenes("any", kind, 20):
        told = note(scene, language)
        for fact in facts(scene):
            choice, short = ask(fact, language, rng, "?"), ask(fact, language, rng)
            assert len(set(choice.options)) == 4 and choice.options["ABCD".index(choice.answer)] == short.answer
            assert not short.options and choice.text.startswith(short.text) and short.told == short.answer
            assert choice.told == f"{short.answer} {choice.answer}" and extract_letter(choice.told) == choice.answer
            if fact.kind in ("what", "colour", "first", "last", "second_t"):
                assert short.answer in told


def test_words_of_known_scenes():
    scene = next(s for s in scenes("any", "order") if len(s.events) == 2)
    first, last = (e.thing for e in scene.events)
    cut = int(scene.events[1].start)
    assert caption(scene, "en") == f"a {first.colour} {first.name}, then a {last.colour} {last.name}"
    expected = f"0s: {first.colour} {first.name}. {cut}s: {last.colour} {last.name}. {scene.seconds}s: end."
    assert dense_caption(scene, "en") == expected
    by_question = {(f.question, f.about): f.answer for f in facts(scene)}
    assert by_question["first", ""] == first.name and by_question["last", ""] == last.name
    assert by_question["first_colour", ""] == first.colour and by_question["last_colour", ""] == last.colour
    assert by_question["duration", ""] == scene.seconds
    recolour = scenes("any", "recolour", 1)[0]
    by_question = {(f.question, f.about): f.answer for f in facts(recolour)}
    assert [by_question[f"{end}_colour", ""] for end in ("first", "last")] == [
        event.thing.colour for event in recolour.events
    ]
    count = scenes("any", "count", 1)[0]
    assert note(count, "en").splitlines()[0].count(count.events[0].thing.name) == len(count.events)
    aside = scenes("any", "image_aside", 1)[0]
    assert {f.kind: f.answer for f in facts(aside)}["where"] == aside.direction
    assert caption(aside, "en").endswith(f", {aside.direction}") and aside.direction in note(aside, "en")


def test_letters_of_a_question_are_uniform():
    fact, rng = facts(scenes("any", "move", 1)[0])[0], random.Random(0)
    letters = collections.Counter(ask(fact, "en", rng, "?").answer for _ in range(800))
    assert all(150 < letters[letter] < 250 for letter in "ABCD")
    assert ask(fact, "en", rng, "C").answer == "C"


def test_chinese_words_cut_every_chinese_text():
    words = sorted(chinese_words(), key=len, reverse=True)
    for kind in KINDS:
        for scene in scenes("any", kind, 5):
            text = note(scene, "zh") + caption(scene, "zh") + dense_caption(scene, "zh")
            for w in words:
                text = text.replace(w, " ")
            assert text.isascii(), text


def test_pictures_show_the_colours_named():
    for scene in scenes("train", "still", 30):
        frame = Painter(scene).frame(0).astype(float)
        inked = frame.reshape(-1, 3)[np.abs(frame - scene.background).sum(-1).argmax()]
        hue = inked / inked.max()
        nearest = min(RGB, key=lambda name: np.abs(hue - np.array(RGB[name]) / max(RGB[name])).sum())
        assert nearest == scene.events[0].thing.colour
        assert np.abs(frame[:4].mean() - scene.background) < 2


def test_counted_things_stand_apart():
    for scene in scenes("train", "count", 20):
        centres = [(e.x0, e.y0) for e in scene.events]
        for i, a in enumerate(centres):
            assert all(max(abs(a[0] - b[0]), abs(a[1] - b[1])) > 25 for b in centres[:i])


def test_files_of_the_corpus(corpus):
    counts = corpus.manifest["counts"]
    for path in (corpus.warmup, *corpus.stages, *corpus.eval_files.values()):
        records = read_records(path)
        assert len(records) == counts[path.name] > 0
        assert len({r["id"] for r in records}) == len(records)
        for record in records:
            tags = sum(t["value"].count(f"<{k}>") for t in record["conversations"] for k in ("image", "video"))
            medium = record.get("image") or record.get("video")
            assert tags == bool(medium) and (medium is None or (corpus.folder / medium).stat().st_size > 500)
            assert [t["from"] for t in record["conversations"]] == ["human", "gpt"] * (
                len(record["conversations"]) // 2
            )
    assert len(read_records(corpus.warmup)) == sum(count // 100 for count, _ in LESSONS)
    assert any(len(r["conversations"]) >= 4 for r in read_records(corpus.stages[3]))


def test_drills_of_the_warmup_grow_harder(corpus):
    lessons = {}
    for record in read_records(corpus.warmup):
        turns = [t["value"] for t in record["conversations"]]
        if turns[0].startswith(("Which is", "哪个是", "Name them", "都说")):
            lessons.setdefault(record["id"].split("-")[1], []).append(turns)
    for question, said in (turns for drills in lessons.values() for turns in drills):
        first, *lines = question.split("\n")
        options = {line[0]: line[2:].strip() for line in lines}
        assert list(options) == list("ABCD")[: len(lines)] and len(set(options.values())) == len(lines)
        answers = [answer.split(" ") for answer in re.split(r"\. |。", said)]
        assert all(options[letter] == words for words, letter in answers)
        assert len(answers) == len(options) if first in ("Name them.", "都说。") else answers[0][0] in first
    assert all(question.count("\n") == 2 and question.isascii() for question, _ in lessons["0"])
    assert any(not question.isascii() for question, _ in lessons["3"])


def test_no_training_record_names_held_out_media(corpus):
    for path in corpus.stages:
        assert "held_out" not in path.read_text()
    for path in corpus.eval_files.values():
        assert all("held_out" in (r.get("video") or r["image"]) for r in read_records(path))


def test_videos_are_h264_of_the_length_told(corpus):
    for name in ("short", "long"):
        for record in read_records(corpus.eval_files[name]):
            if record["question_kind"] != "duration" or record["format"] != "open":
                continue
            with av.open(str(corpus.folder / record["video"])) as container:
                stream = container.streams.video[0]
                assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            fps = TINY.long_fps if name == "long" else TINY.short_fps
            assert frames[0].shape == (CANVAS, CANVAS, 3)
            assert record["answer"] == str(len(frames) // fps)


def test_evaluation_is_balanced_and_the_same_in_both_languages(corpus):
    records = read_records(corpus.eval_files["short"])
    choice = [r for r in records if r["format"] == "mcq"]
    assert len(choice) == 48 and len(records) == 72
    assert collections.Counter(r["answer"] for r in choice) == dict.fromkeys("ABCD", 12)
    assert len({r["question_kind"] for r in choice}) == 8
    for english, chinese in zip(records[::2], records[1::2], strict=True):
        assert (english["language"], chinese["language"]) == ("en", "zh")
        assert english["video"] == chinese["video"] and english["question_kind"] == chinese["question_kind"]
        assert english["format"] == chinese["format"] and len(english["options"]) == len(chinese["options"])
        assert not english["options"] or english["answer"] == chinese["answer"]


def test_the_same_seed_gives_the_same_bytes(corpus, tmp_path):
    again = make_corpus(tmp_path / "again", 3, mixture=TINY, processes=2, tell=lambda line: None)
    files = sorted(p.relative_to(corpus.folder) for p in corpus.folder.rglob("*.*") if p.name != "manifest.json")
    assert files == sorted(p.relative_to(again.folder) for p in again.folder.rglob("*.*") if p.name != "manifest.json")
    assert all((corpus.folder / f).read_bytes() == (again.folder / f).read_bytes() for f in files)


def test_a_share_of_stages_4_and_5_is_put_in_the_words_of_benchmarks_and_nothing_else_changes(corpus, tmp_path):
    phrasing = Phrasing("Asked: {question}\n{options}\nGive one letter.", "({letter}) {text}", "Watch.", "Best: (")
    mixture = dataclasses.replace(TINY, phrased=0.2)
    made = make_corpus(tmp_path / "corpus", 3, mixture=mixture, phrasings=(phrasing,), processes=1, tell=lambda _: None)
    pairs = list(zip((corpus.warmup, *corpus.stages), (made.warmup, *made.stages), strict=True))
    assert [a.read_bytes() == b.read_bytes() for a, b in pairs] == [True, True, True, True, False, False]
    differ, orders, by_id = [], [], {}
    for a, b in pairs[4:]:
        plain, put = read_records(a), read_records(b)
        assert put[: len(plain)] == plain
        by_id |= {one["id"]: one for one in plain}
        differ += [(by_id[other["id"].removesuffix("-phrased")], other) for other in put[len(plain) :]]
    assert 0.1 < len(differ) / sum(len(read_records(a)) for a, _ in pairs[4:]) < 0.3
    for one, other in differ:
        assert other["id"] == one["id"] + "-phrased" and other["video"] == one["video"]
        system, *turns = (turn["value"].removeprefix("<video>\n") for turn in other["conversations"])
        said = dict(zip(turns[::2], turns[1::2], strict=True))
        assert system == "Watch." and len(said) == 3
        (asked,) = (question for question in said if question.endswith("\nGive one letter."))
        words, letter = said.pop(asked).removeprefix("Best: (").rsplit(" ", 1)
        assert asked.startswith("Asked: ") and f"({letter}) {words}\n" in asked
        (described,) = (question for question in said if question.startswith("Describe the video"))
        assert not said.pop(described).endswith((" A", " B", " C", " D"))
        ((without, answer),) = said.items()  # the same words, nothing to choose from
        assert without.startswith("Asked: ") and "(A)" not in without and not answer.endswith((" A", " B", " C", " D"))
        orders.append(turns.index(asked))
    assert set(orders) == {0, 2, 4}
    assert list(made.texts_for_tokenizer()) == list(corpus.texts_for_tokenizer())


def test_the_quickstart_speaks_as_benchmarks_do():
    words = phrasings()
    assert len(words) == 8 and any("Respond with only the letter" in phrasing.text for phrasing in words)
    assert {phrasing.prefill for phrasing in words} == {"", "Best option:(", "Best Option: ("}
    assert [bool(phrasing.when) for phrasing in words] == [False] * 7 + [True]


def test_long_videos_of_one_shape_are_asked_when_it_appears_and_nothing_else_changes(tmp_path):
    media = dict.fromkeys(("images", "short", *(f"held_out/{name}" for name in ("images", "short", "long"))), [])
    media["long"] = scenes("train", "long")
    none = dict.fromkeys(("eval_image", "eval_short", "eval_long"), (0, 0))
    plan = dataclasses.replace(TINY, longs=60, phrased=0.01, **none)
    for name, words in (("without", phrasings()[:-1]), ("with", phrasings())):
        (tmp_path / name).mkdir()
        write_records(plan, 0, media, words, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "with").iterdir())
    changed = [f for f in files if (tmp_path / "with" / f).read_bytes() != (tmp_path / "without" / f).read_bytes()]
    assert changed == ["stage5.jsonl"]
    before, after = (read_records(tmp_path / name / "stage5.jsonl") for name in ("without", "with"))
    assert after[: len(before)] == before
    asked = after[len(before) :]
    assert 5 < len(asked) < 30
    wording, orders = NEEDLE_TIME.wording("plain", "choice"), set()
    for record in asked:
        scene = media["long"][int(record["video"][-9:-4])]
        (event,) = scene.events
        assert record["id"].endswith("-when-en-phrased") and event.thing.name in SHAPES  # no text for the tokenizer
        turns = [turn["value"].removeprefix("<video>\n") for turn in record["conversations"]]
        said = dict(zip(turns[::2], turns[1::2], strict=True))
        (choice,) = (question for question in said if "\nB. " in question)
        options = tuple(re.findall(r"^[A-D]\. (.*)$", choice, re.MULTILINE))
        assert choice == wording.prompt(Question("1", (), "", options))  # as the benchmark puts it
        answer = extract_letter(said.pop(choice), "ABCD", options)
        assert options["ABCD".index(answer)] == f"{event.start} seconds"
        others = [int(option.split()[0]) for option in options if option != f"{event.start} seconds"]
        assert all(abs(other - event.start) >= 10 and other < scene.seconds for other in others)
        assert {other % 10 for other in others} <= {6, 7, 8}  # as those at which things appear: no hint
        assert said.pop(wording.text.partition("\n{options}")[0]) == f"{event.start} seconds"
        ((request, described),) = said.items()
        assert request.startswith("Describe the video") and not extract_letter(described)
        orders.add(turns.index(choice))
    assert orders == {0, 2, 4}


def test_a_finished_corpus_is_reused_and_others_are_refused(corpus, tmp_path):
    before = corpus.stages[0].stat().st_mtime_ns
    again = make_corpus(corpus.folder, 3, mixture=TINY, processes=1, tell=lambda line: None)
    assert again == corpus and corpus.stages[0].stat().st_mtime_ns == before
    with pytest.raises(UserError, match="a corpus of another seed; remove"):
        make_corpus(corpus.folder, 4, mixture=TINY, tell=lambda line: None)
    (tmp_path / "mine.txt").write_text("not a corpus")
    with pytest.raises(UserError, match="holds files"):
        make_corpus(tmp_path, 3, mixture=TINY, tell=lambda line: None)


def test_an_interrupted_corpus_is_begun_anew(tmp_path):
    partial = tmp_path / "corpus.partial"
    partial.mkdir()
    (partial / "stage1.jsonl").write_text("cut o")
    little = dataclasses.replace(TINY, images=4, shorts=4, held_shorts=9, longs=1, held_longs=1)
    corpus = make_corpus(tmp_path / "corpus", 0, mixture=little, processes=1, tell=lambda line: None)
    assert not partial.exists() and json.loads((corpus.folder / "manifest.json").read_text())["settings"]["seed"] == 0


def test_chat_examples_and_tokenizer_text(corpus):
    for title, video, questions in corpus.chat_examples():
        assert title and video.is_file() and len(questions) >= 2
    texts = list(corpus.texts_for_tokenizer(limit=20))
    assert "红色" in texts and "circle" in texts
    assert not any("<video>" in t or "<image>" in t for t in texts)


def test_the_report_shows_a_few_frames_of_a_long_video(corpus):
    frames, times = pictures(next((corpus.folder / "media/held_out/long").glob("*.mp4")))
    assert len(frames) == len(times) == FRAMES_SHOWN and times[-1] > 50
