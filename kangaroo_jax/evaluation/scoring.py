"""Scores generated answers: the letter of a multiple-choice answer, exact match of an open one, and shares.

The rules are those usual in video benchmarks: the model generates text, the letter is extracted from it, and an
answer without a letter is wrong.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kangaroo_jax.evaluation.extraction.strict import LETTERS, extract_letter

Row = dict[str, Any]


def normalise(text: str) -> str:
    """Text as `exact_match` compares it.

    Full-width forms become plain ones (NFKC) and case is folded. Punctuation is removed, except a point, comma or
    minus inside a number, and so is a leading `a`, `an` or `the`. Runs of spaces become one, and none beside Chinese.
    """
    plain = re.sub("['\u2019]", "", unicodedata.normalize("NFKC", text).casefold())
    plain = re.sub(r"(?<!\d)[.,]|[.,](?!\d)", " ", plain)  # not inside a number
    plain = re.sub(r"(?<=\S)-|-(?!\d)", " ", plain)  # not a minus
    words = "".join(c if c in ".,-" or unicodedata.category(c)[0] not in "PZC" else " " for c in plain).split()
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return re.sub(r"\s*([\u3400-\u9fff])\s*", r"\1", " ".join(words))


def exact_match(prediction: str, answer: str) -> bool:
    """Whether an open answer is the expected one after `normalise`."""
    return normalise(prediction) == normalise(answer)


def is_correct(record: Mapping[str, Any], prediction: str) -> bool:
    """Whether a generated answer to an evaluation record is right.

    A record with `options` is multiple choice and its `answer` a letter; one without is open.
    """
    options = record.get("options") or ()
    if options:
        return bool(extract_letter(prediction, LETTERS[: len(options)], options) == record["answer"])
    return exact_match(prediction, record["answer"])


def score(records: Sequence[Mapping[str, Any]], predictions: Sequence[str]) -> dict[str, Any]:
    """Accuracies of generated answers to evaluation records.

    Records have `answer`, `options` (empty for open questions), `format` ("mcq" or "open"), `question_kind` and
    `language`. Returns `{"all", "by_format", "by_kind", "by_language", "by_language_format"}`: each entry of the
    last four maps a name (`zh_mcq` in the last; `mcq/colour` in `by_kind`) to the same small table as "all":
    `accuracy` and `chance` from 0 to 1 (chance is 1 / options, 0 for an open question), `count`, and `no_letter`,
    the count of multiple-choice answers from which no letter could be read. An empty list gives accuracy 0.

    Raises ValueError if the two lists differ in length.
    """
    if len(records) != len(predictions):
        raise ValueError(f"{len(records)} records but {len(predictions)} predictions")
    rows = [_row(record, prediction) for record, prediction in zip(records, predictions, strict=True)]
    return {
        "all": _table(rows),
        "by_format": _group(rows, lambda r: r["format"]),
        "by_kind": _group(rows, lambda r: f"{r['format']}/{r['kind']}"),
        "by_language": _group(rows, lambda r: r["language"]),
        "by_language_format": _group(rows, lambda r: f"{r['language']}_{r['format']}"),
    }


def _row(record: Mapping[str, Any], prediction: str) -> Row:
    options = record.get("options") or ()
    return {
        "format": record["format"],
        "kind": record["question_kind"],
        "language": record["language"],
        "correct": is_correct(record, prediction),
        "chance": 1 / len(options) if options else 0.0,
        "no_letter": bool(options) and not extract_letter(prediction, LETTERS[: len(options)], options),
    }


def _group(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, Row]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return {name: _table(groups[name]) for name in sorted(groups)}


def _table(rows: Sequence[Row]) -> Row:
    count = max(len(rows), 1)
    return {
        "accuracy": sum(r["correct"] for r in rows) / count,
        "chance": sum(r["chance"] for r in rows) / count,
        "count": len(rows),
        "no_letter": sum(r["no_letter"] for r in rows),
    }
