"""What a decoder that spoke before still knows, and how it is reminded while it learns to see.

It is asked plain questions, and reads a text that comes with Python. Reminders are its own answers to other questions,
from before: a share of the conversations of the stages in which it trains.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kangaroo_jax.corpus.records import record_of
from kangaroo_jax.inference.chat import Kangaroo
from kangaroo_jax.inference.history import ask, conversation
from kangaroo_jax.inference.requests import Request
from kangaroo_jax.quickstart.recipe import ANSWERS_DTYPE
from kangaroo_jax.report.page import render
from kangaroo_jax.system.files import write_bytes, write_json
from kangaroo_jax.system.json_text import json_line
from kangaroo_jax.system.progress import Tell

# Questions that SmolLM2-135M-Instruct answers right, and a word of the answer.
PLAIN = (
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Germany?", "Berlin"),
    ("What is the capital of Egypt?", "Cairo"),
    ("How many days are there in a week?", "seven|7"),
    ("How many months are there in a year?", "twelve|12"),
    ("What is the chemical symbol for water?", "H2O"),
    ("What is the opposite of hot?", "cold"),
    ("What star is at the centre of our solar system?", "Sun"),
    ("What is the largest ocean on Earth?", "Pacific"),
)
_SUBJECTS = (
    *(
        "rain",
        "a volcano",
        "the Moon",
        "gravity",
        "a river",
        "the ocean",
        "an earthquake",
        "ice",
        "the wind",
        "a desert",
    ),
    *(
        "a computer",
        "a bicycle",
        "a train",
        "a telescope",
        "a clock",
        "a library",
        "a bridge",
        "a camera",
        "paper",
        "glass",
    ),
    *("a dog", "an elephant", "a whale", "an ant", "a tree", "a flower", "an apple", "rice", "bread", "salt"),
    *("mathematics", "music", "football", "chess", "history", "a poem", "a school", "a market", "money", "a map"),
)
_REQUESTS = ("What is {}?", "Tell me something about {}.", "Write one sentence about {}.", "Why is {} important?")
SHARE = 0.08  # of the conversations of stages 4 and 5
_LONGEST, _CHUNK, _CHUNKS = 96, 384, 5  # tokens of an answer, and of the text in each reading; how many readings


def remind(checkpoint: Path, path: Path, scale: float, tell: Tell) -> Path:
    """Write the decoder's own answers to plain requests to `path`, once, and return it.

    An answer that does not end by itself is left out, unless none does.
    """
    if path.exists():
        return path
    asked = [request.format(subject) for subject in _SUBJECTS for request in _REQUESTS]
    asked = asked[:: max(1, round(1 / max(scale, 1 / len(asked))))]
    with Kangaroo.load(checkpoint, dtype=ANSWERS_DTYPE) as model:
        replies = model.generate([conversation([ask(text)]) for text in asked], max_new_tokens=_LONGEST)
    pairs = [(text, reply) for text, (reply,) in zip(asked, replies, strict=True)]
    ended = [(text, reply) for text, reply in pairs if reply.finish_reason == "stop"]
    records = [record_of(f"plain-{i:04d}", [(text, str(reply))]) for i, (text, reply) in enumerate(ended or pairs)]
    write_bytes(path, b"".join(map(json_line, records)))
    tell(f"{len(records)} answers of the decoder to {len(asked)} plain requests will remind it")
    return path


def measure(checkpoint: Path, path: Path, tell: Tell) -> dict[str, Any]:
    """Answers to PLAIN, how many are right, and the perplexity of Python's licence; kept in `path`.

    `perplexity` is None where Python came without the text of its licence.
    """
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    with Kangaroo.load(checkpoint, dtype=ANSWERS_DTYPE) as model:
        answers = model.answer_many([conversation([ask(text)]) for text, _ in PLAIN], max_new_tokens=32)
        text = licence()
        value = perplexity(model, text) if text else None
    right = sum(is_right(answer, wanted) for answer, (_, wanted) in zip(answers, PLAIN, strict=True))
    found = {"right": right, "asked": len(PLAIN), "answers": list(map(str, answers)), "perplexity": value}
    write_json(path, found)
    tell(f"{checkpoint.name}: {right} of {len(PLAIN)} plain questions, perplexity of Python's licence {value}")
    return found


def is_right(answer: str, wanted: str) -> bool:
    """Whether the answer has one of the words that `|` separates."""
    return any(word.casefold() in answer.casefold() for word in wanted.split("|"))


def licence() -> str:
    """The licence of this Python, from the file beside its library; "" where there is none."""
    here = Path(os.__file__).parent
    for path in (here / "LICENSE.txt", here / "LICENSE", here.parent / "LICENSE.txt"):
        if path.is_file():
            return path.read_text(encoding="utf-8", errors="replace")
    return ""


def perplexity(model: Kangaroo, text: str) -> float:
    """The perplexity of the first tokens of a text, which are read in parts that each begin anew."""
    ids = np.asarray(model.tokenizer.encode(text), np.int32)[: _CHUNK * _CHUNKS]
    parts = [part for part in np.split(ids, range(_CHUNK, len(ids), _CHUNK)) if len(part) > 1]
    tickets = [
        model.engine.submit(Request(part[:1], np.zeros(1, np.bool_), (), 1, continuation=part[1:], logprobs=0))
        for part in parts
    ]
    found = [token.logprob for ticket in tickets for token in ticket.result().logprobs]
    return round(math.exp(-sum(found) / len(found)), 3)


def report_section(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """A section of the report (HTML): what the decoder knew before, and after each stage in which it trained."""
    rows = [(name, f"{one['right']} of {one['asked']}", one["perplexity"] or "–") for name, one in measured.items()]
    questions: Sequence[tuple[str, ...]] = [
        (text, *(one["answers"][number] for one in measured.values())) for number, (text, _) in enumerate(PLAIN)
    ]
    return render("language.html", rows=rows, names=list(measured), questions=questions)
