"""The plan of an instruction set, and the checks of questions by their words."""

import itertools
from collections import Counter

import pytest

from kangaroo_jax.curation.instruct.checks import flaw_of_options, flaw_of_question, says_the_same
from kangaroo_jax.curation.instruct.config import instruct_config
from kangaroo_jax.curation.instruct.plan import cells_of, letters, slots, targets, types_of
from kangaroo_jax.curation.instruct.records import schema
from kangaroo_jax.curation.instruct.taxonomy import TASKS, TYPES
from kangaroo_jax.errors import UserError

ROWS = [{"id": f"c{i}-en", "clip": f"c{i}", "language": "en"} for i in range(40)]


def test_the_papers_shares_are_met_by_the_targets():
    config = instruct_config()
    cells = cells_of(config)
    assert sum(cells.values()) == 2240
    for samples in (1, 7, 2000, 2_240_000):
        counts = targets(cells, samples)
        assert sum(counts.values()) == samples
        assert all(abs(counts[cell] - samples * share / 2240) < 1 for cell, share in cells.items())
    counts = targets(cells, 2_240_000)
    assert (counts["mcq", "en"], counts["single", "zh"], counts["multi", "zh"]) == (615_000, 404_000, 88_000)


def test_captions_and_types_take_turns_and_order_of_the_file_changes_nothing():
    config = instruct_config()
    planned = list(slots(("mcq", "en"), ROWS, config))
    assert len(planned) == 40 * len(TYPES) and len({slot.id for slot in planned}) == len(planned)
    for turn in range(3):
        part = planned[40 * turn : 40 * (turn + 1)]
        assert {slot.row["clip"] for slot in part} == {row["clip"] for row in ROWS}
        assert max(Counter(slot.types[0] for slot in part).values()) <= 3
    of_one = [slot.types[0] for slot in planned if slot.row["clip"] == "c7"]
    assert sorted(of_one) == sorted(TYPES)
    assert [slot.id for slot in slots(("mcq", "en"), ROWS[::-1], config)] == [slot.id for slot in planned]
    assert len(list(slots(("short_caption", "en"), ROWS, config))) == 40
    assert not list(slots(("mcq", "zh"), ROWS, config))
    rounds = Counter(len(slot.types) for slot in itertools.islice(slots(("multi", "en"), ROWS, config), 200))
    assert set(rounds) == {2, 3, 4} and all(len(set(slot.types)) == len(slot.types) for slot in planned)


def test_letters_are_balanced_and_in_no_pattern():
    dealt = letters(2001, 4, seed=1)
    counts = Counter(dealt)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert dealt != letters(2001, 4, seed=2) and dealt == letters(2001, 4, seed=1)
    following = Counter(zip(dealt, dealt[1:], strict=False))
    assert len(following) == 16  # any letter may follow any


@pytest.mark.parametrize(
    ("question", "answer", "distractors", "flaw"),
    [
        ("What does the man hold?", "a cup", ["a book", "a hat", "a lamp"], ""),
        ("他拿着什么？", "一个杯子", ["一本书", "一顶帽子", "一盏灯"], ""),
        ("What does he hold?", "a cup", ["A  cup.", "a hat", "a lamp"], "options alike"),
        ("What does he hold?", "a cup", ["a hat", "the hat", "a  HAT"], "options alike"),
        ("What does he hold?", "a red cup", ["cup, a red", "a hat", "a lamp"], "options alike"),
        ("How long is it?", "4 seconds", ["6 seconds", "8 seconds", "12 seconds"], ""),
        ("What does he hold?", "a cup", ["", "a hat", "a lamp"], "empty option"),
        ("What does he hold?", "a cup", ["a book", "a hat", "none of the above"], "catch-all option"),
        ("他拿着什么？", "杯子", ["书", "帽子", "以上都是"], "catch-all option"),
        ("What colour is the red car?", "red", ["blue", "green", "white"], "answer in the question"),
        ("Is it a red or a blue car?", "red", ["blue", "red and blue", "white"], ""),
        (
            "What does he do?",
            "he opens the old wooden door slowly and walks out",
            ["he sits", "he eats", "he reads"],
            "answer longest by far",
        ),
    ],
)
def test_flaws_of_options(question, answer, distractors, flaw):
    assert flaw_of_options(question, answer, distractors) == flaw


def test_flaws_of_questions_and_blind_answers():
    assert flaw_of_question("What is it?", "a dog", "en") == ""
    assert flaw_of_question("What is it?", " ", "en") == "empty"
    assert flaw_of_question("What is it?", "I'm sorry, I cannot see it.", "en") == "refusal"
    assert flaw_of_question("What is it?", "a dog", "zh") == "language"
    assert says_the_same("Paris.", "paris", 0.5) and says_the_same("It is the Eiffel Tower", "the Eiffel Tower", 0.5)
    assert not says_the_same("a red cup", "a blue lamp", 0.5) and not says_the_same("3", "5", 0.5)


def test_mistakes_in_the_config_are_one_line():
    config = instruct_config()
    config.types = ("acton",)
    with pytest.raises(UserError, match="did you mean 'action'"):
        types_of(config)
    config.shares.mcq_en = -1.0
    with pytest.raises(UserError, match="not negative"):
        cells_of(config)
    config.shares = {"mqc_en": 1.0}
    with pytest.raises(UserError, match="did you mean 'mcq_en'"):
        cells_of(config)


def test_the_schema_names_the_same_tasks_and_types():
    properties = schema()["properties"]
    assert properties["task"]["enum"] == list(TASKS)
    assert properties["types"]["items"]["enum"] == list(TYPES)
