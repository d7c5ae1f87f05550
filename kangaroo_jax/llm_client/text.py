"""Sentences, words and languages of captions, in English and Chinese."""

import re
from collections.abc import Set

LANGUAGES = ("en", "zh")
_SENTENCE_END = re.compile(  # a mark (and a quote) with a space after it; Chinese needs no space
    r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+(?=[^a-z\s])|(?<=[。！？；])(?![”’）」])|(?<=[。！？；][”’）」])|\n+"
)
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?|\d+(?:\.\d+)?|[\u3400-\u4dbf\u4e00-\u9fff]")
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
_LATIN = re.compile(r"[A-Za-z]+")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_COMMON = frozenset(
    "a an the and or but of in on at to from by with into onto over under for as is are was were be been being it its "
    "this that these those there then while who which what has have had does do did not no he she they them his her "
    "their we you i s can could will would also very some other one image picture video frame scene shows showing "
    "shown seen see appears "
    "的 了 在 是 一 个 有 和 与 着 中 上 下 里 这 那 他 她 它 们 也 都 就 并 而 及 其 到 被 把 "
    "对 从 图 片 视 频 画 面".split()
)
_REFUSALS = re.compile(
    r"\b(i'?m sorry|i am sorry|i apologi[sz]e|i (?:can'?t|cannot|can not|am unable to|'m unable to) (?:assist|help|"
    r"describe|provide|see|view|identify|answer|process)|as an ai\b|as a (?:large )?language model|unable to "
    r"(?:process|view|see) (?:the|this) (?:image|video|frame))|"
    r"抱歉|对不起|我(?:无法|不能)(?:描述|提供|查看|看到|回答|协助|帮助|识别)|"
    r"作为(?:一个|一名)?(?:人工智能|AI|语言模型)",
    re.IGNORECASE,
)


def sentences(text: str) -> list[str]:
    """The sentences of a text in either language, each with its final mark."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part and part.strip()]


def joined(parts: list[str], language: str) -> str:
    """Sentences as one text: Chinese has no spaces between them."""
    return ("" if language == "zh" else " ").join(parts)


def words(text: str) -> list[str]:
    """Words in lower case; each Chinese character and each number is a word."""
    return [word.lower() for word in _WORD.findall(text)]


def content_words(text: str) -> set[str]:
    """The content words: without articles, prepositions and words for the picture itself."""
    return {_stem(word) for word in words(text)} - _COMMON


def _stem(word: str) -> str:
    """Plural and third person without their s, so that "dogs run" and "a dog runs" agree."""
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def iou(a: Set[str], b: Set[str]) -> float:
    """Intersection over union of two sets of words, from 0 to 1; 0 for two empty sets."""
    return len(a & b) / len(a | b) if a or b else 0.0


def repeats(sentence: str, earlier: str, threshold: float) -> bool:
    """Whether a sentence repeats an earlier one: the IoU of their word sets is above a threshold.

    Sentences with different numbers never repeat each other.
    """
    if set(_NUMBER.findall(sentence)) != set(_NUMBER.findall(earlier)):
        return False
    return iou(set(words(sentence)), set(words(earlier))) > threshold


def language_share(text: str, language: str) -> float:
    """Share of the words that are in the script of a language, from 0 to 1; 1 for a text without any.

    A Chinese character counts as half a word, as Chinese words have about two.
    """
    han, latin = len(_HAN.findall(text)) / 2, len(_LATIN.findall(text))
    if not han + latin:
        return 1.0
    return (han if language == "zh" else latin) / (han + latin)


def is_refusal(text: str) -> bool:
    """Whether a sentence or answer is a refusal, in either language."""
    return _REFUSALS.search(text) is not None


def length(text: str) -> float:
    """The number of words, where two Chinese characters count as one."""
    found = words(text)
    han = sum(1 for word in found if _HAN.match(word))
    return len(found) - han / 2
