"""What refinement cuts out of captions in both languages, how it scores them, and which clips are chosen."""

import pytest

from kangaroo_jax.curation.annotate import refine
from kangaroo_jax.curation.annotate.choose import choose, level
from kangaroo_jax.curation.annotate.config import annotation_config
from kangaroo_jax.llm_client.text import is_refusal, language_share, length, repeats, sentences

FRAMES = [
    ["A man in a red coat walks his dog.", "A man walks a brown dog in a park."],
    ["The dog runs after a ball.", "A dog catches a ball on the grass."],
]


@pytest.fixture
def rules():
    return annotation_config().refine


def test_sentences_of_both_languages():
    assert sentences('He says "stop!" and goes. It is 3.5 m long? Yes.') == [
        'He says "stop!" and goes.',
        "It is 3.5 m long?",
        "Yes.",
    ]
    told = ["一个男人走路。", "他说：“停！”", "然后离开；", "天黑了"]
    assert sentences("".join(told)) == told
    assert length("一只小狗 runs") == 3


def test_repeated_sentences_by_word_sets_but_not_with_other_numbers():
    assert repeats("A brown dog runs.", "The dog, brown, runs: a dog.", 0.6)
    assert not repeats("A brown dog runs.", "A brown cat sleeps.", 0.6)
    assert not repeats("At second 3 a dog runs.", "At second 5 a dog runs.", 0.6)
    assert repeats("一只小狗在草地上跑。", "小狗在一只草地上跑！", 0.6)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't assist with that.", True),
        ("As an AI language model, I see a dog.", True),
        ("抱歉，我无法查看图片。", True),
        ("A man is sorry that he cannot see the bus.", False),
        ("一个男人向朋友道歉。", False),
    ],
)
def test_refusals(text, refused):
    assert is_refusal(text) == refused


def test_every_rule_drops_its_sentence(rules):
    text = (
        "A man in a red coat walks his brown dog in a park. I cannot assist with more. 一个男人在公园里遛狗。 "
        "A brown dog walks with a man in a red coat in a park. Astronauts explore distant planets. "
        "The dog runs after a ball and catches it on the grass."
    )
    rules.max_words = 22
    found = refine.refine(text, "en", FRAMES, rules)
    assert found.text == "A man in a red coat walks his brown dog in a park." and not found.reason
    assert [rule for _, rule in found.dropped] == ["refusal", "language", "repeated", "unsupported", "length"]
    rules.max_words = 100
    assert refine.refine(text, "en", FRAMES, rules).text.endswith("on the grass.")
    assert [rule for _, rule in refine.refine(text, "en", None, rules).dropped] == ["refusal", "language", "repeated"]


def test_a_caption_of_which_too_little_is_left_is_no_good(rules):
    assert refine.refine("A dog.", "en", FRAMES, rules).reason.startswith("length")
    assert refine.refine("I'm sorry, I cannot describe it.", "en", FRAMES, rules).reason.startswith("refusal")
    assert refine.refine("A man walks his dog in a park.", "zh", None, rules).reason.startswith("language")
    chinese = "一个穿红色外套的男人在公园里遛一只棕色的狗。"
    assert refine.refine(chinese, "zh", None, rules) == refine.Refined(chinese, (), "")
    assert language_share("红色 car", "zh") == 0.5 and language_share("7, 8", "en") == 1


def test_scores_follow_what_frames_say(rules):
    true, false = "A man walks a dog that catches a ball.", "A woman rides horses through deserts."
    assert refine.support(true, FRAMES) > 0.8 and refine.support(false, FRAMES) == 0
    agreed = refine.consensus(FRAMES)
    assert 0.2 < agreed < 1 and refine.consensus([["one"], []]) is None
    assert refine.consensus([["a red dog", "red dogs"]]) == 1
    good, bad = (refine.score(text, refine.support(text, FRAMES), agreed, rules) for text in (true, false))
    assert good["score"] > bad["score"] + 0.3 and 0 <= bad["score"] <= good["score"] <= 1
    assert refine.score(true, None, None, rules)["score"] == refine.score(true, None, None, rules)["length"]


def test_level_gives_every_group_the_same_or_all_it_has():
    assert level({"a": 100, "b": 3, "c": 50}, 23) == {"a": 10, "b": 3, "c": 10}
    assert level({"a": 2, "b": 2}, 9) == {"a": 2, "b": 2}
    assert sum(level({"a": 9, "b": 9, "c": 9}, 10).values()) == 10
    assert level({}, 5) == {}


def test_the_best_of_every_category_are_chosen_in_any_order():
    rows = [
        {"clip": f"c{i}", "outcome": "ok", "scores": {"score": i / 40}, "category": "many" if i < 30 else "few"}
        for i in range(40)
    ]
    rows += [{"clip": "c39", "outcome": "error", "category": "few"}]  # its other language has no caption
    rules = annotation_config().choose
    rules.at_least = 0
    rules.share = 0.5
    chosen = choose(rows, 40, rules)
    assert chosen == choose(rows[::-1], 40, rules) == {f"c{i}" for i in [*range(19, 30), *range(30, 39)]}
    rules.balance = False
    assert choose(rows, 40, rules) == {f"c{i}" for i in range(19, 39)}
    rules.update(count=5, min_score=0.9)
    assert choose(rows, 40, rules) == {"c36", "c37", "c38"}
