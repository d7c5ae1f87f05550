"""The corpus' questions and answers as whole sentences, for a decoder that speaks before it sees its first picture.

A letter follows its option in the question as in the answer: `What colour is it: red (A), blue (B), green (C) or white
(D)?` and `It is blue (B).` So whoever has found the words copies the letter. A frozen decoder has learnt to copy, but
not to look up the letter at the head of a line: SmolLM2, told the colour and given the answer's words, names the right
letter in 81% here, and in 35% where each option is a line `B. blue` (16 and 20 questions).
"""

import dataclasses

from kangaroo_jax.corpus.scenes import SHAPES, THINGS
from kangaroo_jax.corpus.text import LANGUAGES, LETTERS, Fact, Question, Turn

# By the question's key: the answer in English and in Chinese.
_ANSWERS = {
    "what": ("It is {}", "这是{}"),
    "colour": ("It is {}", "它是{}"),
    "direction": ("It moves {}", "它向{}移动"),
    "where": ("It is at the {}", "它在{}"),
    "count": ("The number is {}", "有{}"),
    "first": ("It is {}", "先出现{}"),
    "last": ("It is {}", "最后出现{}"),
    "first_colour": ("It is {}", "先出现{}"),
    "last_colour": ("It is {}", "最后出现{}"),
    "second_t": ("It is {}", "看到{}"),
    "duration": ("There are {}", "有{}"),
}
_SECONDS = (" seconds", "秒")
_STOPS = (".", "。")


def in_a_sentence(question: Question, fact: Fact) -> Question:
    """The question with its options in it, and with a sentence as its answer, which ends with the letter."""
    at = LANGUAGES.index(question.language)
    asked, answer = question.text.split("\n", 1)[0], _ANSWERS[fact.question][at]
    if not question.options:
        sentence = answer.format(_named(question.answer, fact, at))
        return dataclasses.replace(question, answer=sentence + _STOPS[at])
    named = [_named(option, fact, at) for option in question.options]
    lettered = [f"{name}{' ' * (at == 0)}({letter})" for name, letter in zip(named, LETTERS, strict=False)]
    comma, colon, last, mark = ((", ", ": ", " or ", "?"), ("、", "：", "还是", "？"))[at]
    text = asked.removesuffix(mark) + colon + comma.join(lettered[:-1]) + last + lettered[-1] + mark
    said = answer.format(lettered[LETTERS.index(question.answer)]) + _STOPS[at]
    return dataclasses.replace(question, text=text, said=said)


def _named(option: str, fact: Fact, at: int) -> str:
    """An option as it stands in a sentence."""
    if fact.question == "duration":
        return option + _SECONDS[at]
    if at == 0 and fact.answer in THINGS:
        return f"a {option}" if option in SHAPES else f"the digit {option}"
    return option


def as_a_sentence(turn: Turn, language: str) -> Turn:
    """A description that begins with a capital letter and ends with a full stop."""
    request, said = turn
    stop = _STOPS[LANGUAGES.index(language)]
    return request, said[0].upper() + said[1:] + ("" if said.endswith(stop) else stop)
