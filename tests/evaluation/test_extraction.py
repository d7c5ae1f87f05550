"""What is read in an answer: by our strict rules, and by each harness' rules as its own functions read it."""

import json
from pathlib import Path

import pytest

from kangaroo_jax.evaluation.extraction import harnesses
from kangaroo_jax.evaluation.extraction.strict import extract_letter

# Texts, the letter that each means ("" for none), how many of 2,000 answers were it, and what harnesses read in it.
RECORDED = [
    json.loads(line)
    for line in Path(__file__).with_name("recorded_readings.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        (" b\n", "B"),
        ("(c)", "C"),
        ("**D**", "D"),
        ("Ｂ", "B"),
        ("（Ａ）", "A"),
        ("B. blue", "B"),
        ("B: blue, not A", "B"),
        ("B、蓝色", "B"),
        ("C\nbecause it moves", "C"),
        ("B blue", "B"),
        ("The answer is C.", "C"),
        ("The correct answer is: (d)", "D"),
        ("The answer is B because it moves", "B"),
        ("Option A is wrong. The answer is B", "B"),
        ("答案是C", "C"),
        ("正确答案：D。", "D"),
        ("我选 B", "B"),
        ("选项A", "A"),
        ("It is a red ring (C)", "C"),
        ("A red ring, so (D)", "D"),
        ("A red ring", ""),
        ("A or B", ""),
        ("I cannot answer a question", ""),
        ("red", ""),
        ("Bad", ""),
        ("", ""),
        ("E", ""),
        ("红色", ""),
        ("<think>It may be A.</think> B", "B"),
        ("<think>It may be A, or (B)", ""),
        ("maybe A</think>\n\nThe answer is C", "C"),
        ("It is vitamin A (C)", "C"),
        ("(A) or (B)", ""),
        ("the second one (X)", ""),
    ],
)
def test_letter(text, letter):
    assert extract_letter(text) == letter


def test_letter_of_other_choices():
    assert extract_letter("E", "ABCDE") == "E"
    assert extract_letter("I see two of them", "ABCDEFGHI") == ""
    with pytest.raises(ValueError, match="letters"):
        extract_letter("A", "")


def test_a_capital_in_an_option_that_is_repeated_is_no_letter():
    options = ["Because B is heavier than A", "Vitamin C", "A", "none"]
    assert extract_letter("Because B is heavier than A. D", "ABCD", options) == "D"
    assert extract_letter("vitamin C", "ABCD", options) == ""
    assert extract_letter("It is B", "ABCD", options) == "B"


@pytest.mark.parametrize("reader", sorted(RECORDED[0]["read"]))
def test_every_recorded_answer_is_read_as_by_its_harness(reader):
    assert sum(row["count"] for row in RECORDED) == 2000
    for row in RECORDED:
        read = getattr(harnesses, reader)(row["text"], "ABCD", ())
        if read == harnesses.GUESS:  # the harness drew a letter
            assert not set(row["text"]) & set("ABCDE") and row["read"][reader] in set("ABCD")
        else:
            assert read == row["read"][reader], row["text"]


def test_strict_reads_what_is_meant_and_invents_nothing():
    read = [(row, extract_letter(row["text"])) for row in RECORDED]
    assert not [row["text"] for row, letter in read if letter and letter != row["meant"]]
    meant = sum(row["count"] for row in RECORDED if row["meant"])
    assert sum(row["count"] for row, letter in read if row["meant"] and letter == row["meant"]) >= 0.99 * meant


@pytest.mark.parametrize(
    ("reader", "text", "read"),
    [
        ("official_mvbench", "A) red", "A"),
        ("official_mvbench", "(B) blue", "B"),
        ("official_mvbench", "(", "ABCD"),  # which every option holds
        ("official_mvbench", "", "ABCD"),
        ("official_mvbench", "blue", ""),
        ("official_vnbench", "Answer B", "A"),
        ("official_vnbench", "b", ""),
        ("lmms_egoschema", "(B) or A.", "B"),
        ("lmms_egoschema", "I think that it shows a red ring", "A"),
        ("lmms_egoschema", "no idea", harnesses.GUESS),
        ("official_tempcompass", "B) a coin", "B"),
        ("official_tempcompass", "A. a red ring", "A"),
        ("official_tempcompass", "It is A", ""),
    ],
)
def test_readers_without_a_record(reader, text, read):
    assert getattr(harnesses, reader)(text, "ABCD", ("a red ring", "a coin", "a cube", "a star")) == read
