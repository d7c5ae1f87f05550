import pytest

from kangaroo_jax.evaluation.scoring import exact_match, is_correct, normalise, score


@pytest.mark.parametrize(
    "prediction, answer, same",
    [
        ("Red.", "red", True),
        ("a red  ring", "red ring", True),
        ("8 Seconds", "8 seconds", True),
        ("８秒。", "8秒", True),
        ("8 秒", "8秒", True),
        ("红色 的 环形", "红色的环形", True),
        ("left-hand", "left hand", True),
        ("-7", "7", False),
        ("3.5", "35", False),
        ("3.5.", "3.5", True),
        ("1,000", "1000", False),
        ("red", "blue", False),
        ("", "red", False),
        ("a", "a", True),
    ],
)
def test_exact_match(prediction, answer, same):
    assert exact_match(prediction, answer) is same


def test_normalise_is_idempotent():
    for text in ("The Ring’s  colour!", "第 10 秒，红色。", "-3.5 m", "A"):
        assert normalise(normalise(text)) == normalise(text)


def _record(answer, options, kind, language):
    style = "mcq" if options else "open"
    return {"answer": answer, "options": options, "format": style, "question_kind": kind, "language": language}


def test_score_counts_every_group():
    four = ["red", "blue", "green", "white"]
    records = [
        _record("A", four, "colour", "en"),
        _record("B", four, "colour", "zh"),
        _record("C", four[:2] + ["x", "y"], "what", "en"),
        _record("red", [], "colour", "en"),
        _record("红色", [], "colour", "zh"),
    ]
    result = score(records, ["A. red", "no idea", "D", "Red", "蓝色"])
    assert result["all"]["count"] == 5 and result["all"]["accuracy"] == pytest.approx(2 / 5)
    assert result["by_format"]["mcq"] == {"accuracy": 1 / 3, "chance": 0.25, "count": 3, "no_letter": 1}
    assert result["by_format"]["open"]["accuracy"] == 0.5 and result["by_format"]["open"]["chance"] == 0
    assert result["by_kind"]["mcq/colour"]["accuracy"] == 0.5
    assert result["by_language"]["zh"]["accuracy"] == 0
    assert result["by_language_format"]["en_mcq"]["count"] == 2


def test_score_of_nothing_and_of_unequal_lists():
    assert score([], [])["all"] == {"accuracy": 0, "chance": 0, "count": 0, "no_letter": 0}
    with pytest.raises(ValueError, match="1 records but 0"):
        score([_record("A", ["x", "y"], "what", "en")], [])


def test_two_options_read_only_two_letters():
    assert is_correct(_record("B", ["yes", "no"], "what", "en"), "B")
    assert not is_correct(_record("B", ["yes", "no"], "what", "en"), "C")
