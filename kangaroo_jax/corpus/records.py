"""Records of the corpus: LLaVA conversations, and the questions on held-out media."""

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from kangaroo_jax.corpus.scenes import Scene, has_held_combination
from kangaroo_jax.corpus.sentences import in_a_sentence
from kangaroo_jax.corpus.text import LANGUAGES, LETTERS, Fact, Question, ask, facts


def media_name(folder: str, number: int) -> str:
    """Path of a medium relative to the corpus."""
    return f"media/{folder}/{number:05d}.{'jpg' if folder.endswith('images') else 'mp4'}"


def record_of(name: str, turns: Iterable[tuple[str, str]], medium: str = "") -> dict[str, Any]:
    """A LLaVA record of (question, answer) turns; the medium's tag begins the first question."""
    key = "image" if medium.endswith("jpg") else "video"
    conversations = []
    for i, (question, answer) in enumerate(turns):
        tag = f"<{key}>\n" if medium and not i else ""
        conversations.append({"from": "human", "value": tag + question})
        conversations.append({"from": "gpt", "value": answer})
    return {"id": name, **({key: medium} if medium else {}), "conversations": conversations}


def evaluation_records(
    scenes: Sequence[Scene], folder: str, counts: tuple[int, int], seed: int, sentences: bool = False
) -> list[dict[str, Any]]:
    """Questions on held-out media: kinds take turns, letters are balanced, each is asked in both languages.

    A question has the same options in the same order in both languages. Questions on one medium are adjacent, so that
    its vision tokens can be shared. With `sentences` the true answers are whole sentences.
    """
    rng = random.Random(f"{seed}/{folder}/evaluation")
    chosen: list[tuple[int, Fact, str, str]] = []
    for style, count in zip(("mcq", "open"), counts, strict=True):
        letters = [LETTERS[i % 4] for i in range(count // 2)]
        rng.shuffle(letters)
        for (number, fact), letter in zip(_by_turns(scenes, rng), letters, strict=False):
            chosen.append((number, fact, style, letter if style == "mcq" else ""))
    records: list[dict[str, Any]] = []
    for number, fact, style, letter in sorted(chosen, key=lambda c: c[0]):
        options_seed = rng.getrandbits(32)
        for language in LANGUAGES:
            question = ask(fact, language, random.Random(options_seed), letter)
            question = in_a_sentence(question, fact) if sentences else question
            record = record_of(f"{folder}-{number:05d}-q{len(records):04d}-{language}", [], media_name(folder, number))
            records.append(_evaluation_record(record, question, style, scenes[number]))
    return records


def _by_turns(scenes: Sequence[Scene], rng: random.Random) -> Iterator[tuple[int, Fact]]:
    """(number of the scene, fact), each once, in random order, with the kinds taking turns."""
    by_kind: dict[str, list[tuple[int, Fact]]] = {}
    for number, scene in enumerate(scenes):
        for fact in facts(scene):
            by_kind.setdefault(fact.kind, []).append((number, fact))
    for entries in by_kind.values():
        rng.shuffle(entries)
    while by_kind:
        for kind in sorted(by_kind):
            yield by_kind[kind].pop()
            if not by_kind[kind]:
                del by_kind[kind]


def _evaluation_record(record: dict[str, Any], question: Question, style: str, scene: Scene) -> dict[str, Any]:
    key = "image" if "image" in record else "video"
    turns = record_of("", [(question.text, question.told)], record[key])["conversations"]
    return record | {
        "conversations": turns,
        "question_kind": question.kind,
        "format": style,
        "language": question.language,
        "answer": question.answer,
        "options": list(question.options),
        "scene_kind": scene.kind,
        "unseen_combination": has_held_combination(scene),
    }
