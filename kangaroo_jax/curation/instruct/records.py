"""Conversations as LLaVA records, each checked against the published schema (`schema.json`)."""

import functools
import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.curation.annotate.files import absolute, relative
from kangaroo_jax.curation.instruct.making import LETTERS, Maker, MakingResult, option_lines
from kangaroo_jax.curation.instruct.plan import letters
from kangaroo_jax.llm_client.schemas import mistake


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON schema of a record (draft 2020-12)."""
    return json.loads((Path(__file__).parent / "schema.json").read_text(encoding="utf-8"))


def is_image(row: Any) -> bool:
    """Whether an object of captions.jsonl is about an image."""
    from kangaroo_jax.data.media.image import IMAGE_SUFFIXES  # slow, and a run with nothing to do needs no image

    return row["media"].lower().endswith(IMAGE_SUFFIXES)


def to_records(
    made: Sequence[MakingResult], maker: Maker, folder: Path, output: Path, generator: str
) -> list[dict[str, Any]]:
    """The records of all conversations, in an order drawn by the config's seed.

    Answer letters are assigned to the multiple-choice questions of a language so that each occurs equally often;
    the question's own seed draws the order of the wrong options.

    Args:
        made: conversations to keep.
        maker: gives the config and prompts.
        folder: the folder that media in the captions are relative to.
        output: the folder that media in the records become relative to.
        generator: the model's name.

    Raises:
        RuntimeError: a record is invalid, which is a bug.
    """
    config, dealt = maker.config, dict[str, str]()
    for language in ("en", "zh"):
        ids = sorted(one.slot.id for one in made if one.slot.task == "mcq" and one.slot.language == language)
        random.Random(f"{config.seed}/{language}").shuffle(ids)
        dealt |= dict(zip(ids, letters(len(ids), config.options, config.seed), strict=True))
    records = [_record(one, dealt.get(one.slot.id, ""), maker, folder, output, generator) for one in made]
    for record in records:
        _check(record)
    return sorted(records, key=lambda record: hashlib.sha256(f"{config.seed}/{record['id']}".encode()).hexdigest())


def _record(
    made: MakingResult, letter: str, maker: Maker, folder: Path, output: Path, generator: str
) -> dict[str, Any]:
    slot, row = made.slot, made.slot.row
    kind = "image" if is_image(row) else "video"
    rounds = list(made.rounds)
    choice: dict[str, Any] = {}
    if slot.task == "mcq":
        options = list(made.distractors)
        random.Random(slot.seed).shuffle(options)
        options.insert(LETTERS.index(letter), made.rounds[0][1])
        lines = [made.rounds[0][0], option_lines(options, slot.language)]
        if maker.config.letter_instruction:
            lines.append(maker.prompt("ask_letter", slot.language).text)
        rounds, choice = [("\n".join(lines), letter)], {"options": options, "answer": letter}
    if kind == "image":
        rounds = [(_of_image(question), answer) for question, answer in rounds]
    turns = []
    for number, (question, answer) in enumerate(rounds):
        turns.append({"from": "human", "value": question if number else f"<{kind}>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    record: dict[str, Any] = {"id": slot.id, kind: relative(absolute(row["media"], folder), output)}
    if kind == "video":
        record |= {key: row[key] for key in ("start", "end") if row.get(key) is not None}
    record |= {"language": slot.language, "task": slot.task, "types": list(slot.types)}
    return record | choice | {"conversations": turns, "source": _source(made, generator)}


def _of_image(question: str) -> str:
    return question.replace("video", "image").replace("视频", "图片")


def _source(made: MakingResult, generator: str) -> dict[str, Any]:
    """The origin of a conversation, down to the caption's models."""
    row = made.slot.row
    return {
        "caption": row["id"],
        "clip": row["clip"],
        "caption_sha256": hashlib.sha256(row["caption"].encode()).hexdigest(),
        "caption_models": row.get("models") or {},
        "caption_prompts": row.get("prompts") or {},
        "category": row.get("category") or "",
        "source": row.get("source") or "",
        "licence": row.get("licence") or "",
        "generator": "" if made.slot.task.endswith("_caption") else generator,
        "prompt": made.prompt,
        "checks": dict(made.checks),
    }


def _check(record: dict[str, Any]) -> None:
    """Raise RuntimeError for a record that the schema or our own loader rejects."""
    from kangaroo_jax.data.annotations.conversation import count_tags
    from kangaroo_jax.data.annotations.formats import parse_record

    problem = mistake(record, schema())
    if not problem:
        conversation = parse_record(record, record["id"], "").conversation
        problem = "" if len(count_tags(conversation.turns)) == 1 else "another tag in the text"
    if problem:
        raise RuntimeError(f"record {record['id']}: {problem}")


def sound(records: Iterable[MakingResult]) -> list[MakingResult]:
    """The conversations without media tags in their texts: a tag would refer to a medium that does not exist."""
    return [one for one in records if not any("<video>" in t or "<image>" in t for pair in one.rounds for t in pair)]
