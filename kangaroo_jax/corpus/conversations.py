"""The records of a corpus: captions, conversations and questions about its scenes, for each stage."""

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.corpus.draw import split_scans
from kangaroo_jax.corpus.mixture import CorpusMixture
from kangaroo_jax.corpus.records import evaluation_records, media_name, record_of
from kangaroo_jax.corpus.scenes import Scene, SceneMaker
from kangaroo_jax.corpus.sentences import as_a_sentence, in_a_sentence
from kangaroo_jax.corpus.text import LANGUAGES, Phrasing, Question, appearance, ask, ask_in, describe, some_facts
from kangaroo_jax.corpus.warmup import lesson, warmup_turns
from kangaroo_jax.system.json_text import json_line

PHRASED = "-phrased"  # ends the name of a record that is put in others' words


def _questions(
    scene: Scene, language: str, plan: CorpusMixture, stage: int, rng: random.Random
) -> list[tuple[str, str]]:
    """Rounds of questions on one scene, each fact at most once, sometimes with a description at the end."""
    rounds, times = plan.long_rounds if scene.kind == "long" else plan.rounds, stage >= plan.times_from
    chosen = some_facts(scene, rounds, rng, plan.every_fact, times)
    asked = [ask(fact, language, rng, "?" if rng.random() < plan.multiple_choice else "") for fact in chosen]
    if plan.sentences:
        asked = [in_a_sentence(question, fact) for question, fact in zip(asked, chosen, strict=True)]
    turns = [(q.text, q.told) for q in asked]
    if rng.random() < plan.describe_last:
        turns.append(_description(scene, language, times and bool(scene.seconds) and rng.random() < 0.5, plan))
    return turns


def _description(scene: Scene, language: str, dense: bool, plan: CorpusMixture) -> tuple[str, str]:
    turn = describe(scene, language, dense)
    return as_a_sentence(turn, language) if plan.sentences else turn


def _language(number: int, chinese: float) -> str:
    """The language of conversation `number`: Chinese as soon as its share falls behind."""
    return LANGUAGES[int((number + 1) * chinese) - int(number * chinese)]


def _warmup_records(plan: CorpusMixture, seed: int) -> Iterator[dict[str, Any]]:
    """Text-only conversations, in the order in which they are to be read."""
    rng = random.Random(f"{seed}/warmup")
    maker = _text_maker(rng)
    lessons = warmup_turns(maker, rng, plan.short_kinds, lambda count: max(round(count * plan.warmup), 1))
    return (record_of(name, turns) for name, turns in lessons)


def _text_maker(rng: random.Random) -> SceneMaker:
    """Scenes for text: words of every combination, as any text would have them."""
    return SceneMaker("any", split_scans()["train"], rng)


def _captions(
    media: dict[str, list[Scene]], folder: str, dense: bool, plan: CorpusMixture, stage: int
) -> Iterator[dict[str, Any]]:
    """A caption of each medium in each language that the stage has."""
    languages = LANGUAGES if plan.chinese[stage - 1] else LANGUAGES[:1]
    for i, scene in enumerate(media[folder]):
        for language in languages:
            name = f"{folder}-{i:05d}-{'dense' if dense else 'caption'}-{language}"
            made = record_of(name, [_description(scene, language, dense, plan)], media_name(folder, i))
            if plan.bare_captions:
                made["conversations"].insert(0, {"from": "system", "value": ""})
            yield made


def _instructions(
    media: dict[str, list[Scene]],
    folder: str,
    count: int,
    each: int,
    plan: CorpusMixture,
    stage: int,
    rng: random.Random,
) -> Iterator[dict[str, Any]]:
    """`each` conversations on each of the first `count` media of a folder; languages take turns."""
    for i, scene in enumerate(media[folder][:count]):
        for k in range(each):
            language = _language(i + k, plan.chinese[stage - 1])
            turns = _questions(scene, language, plan, stage, rng)
            yield record_of(f"{folder}-{i:05d}-chat-{k}-{language}", turns, media_name(folder, i))


def _some_phrased(
    records: Iterable[dict[str, Any]],
    scenes: dict[str, Scene],
    plan: CorpusMixture,
    phrasings: Sequence[Phrasing],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """For a share `plan.phrased` of the records one more on the same video, in the words of a phrasing.

    English ones alone: the phrasings are in English. Each begins with its system's text, if it has one. It asks
    with options, without options in the same words, and for a description, in any order: a letter ends the answers
    to options, not those to unusual words.
    """
    chosen = [phrasing for phrasing in phrasings if not phrasing.when]
    for record in records:
        rng = random.Random(f"{seed}/phrased/{record['id']}")
        if chosen and record["id"].endswith("-en") and rng.random() < len(LANGUAGES) * plan.phrased:
            phrasing, scene = rng.choice(chosen), scenes[record["video"]]
            facts = some_facts(scene, 2, rng)
            asked = ask(facts[0], "en", rng, "?"), ask(facts[-1], "en", rng)
            yield _phrased(record["id"], record["video"], scene, phrasing, asked, rng)


def _asked_when(longs: Sequence[Scene], phrasings: Sequence[Phrasing], seed: int) -> Iterator[dict[str, Any]]:
    """A conversation on each long video of one shape, in the words of a phrasing that asks when it appears."""
    chosen = [phrasing for phrasing in phrasings if phrasing.when]
    for number, scene in enumerate(longs):
        rng, moment = random.Random(f"{seed}/when/{number}"), appearance(scene)
        if chosen and moment:
            phrasing = rng.choice(chosen)
            asked = ask_in(phrasing.when, moment, "en", rng, "?"), ask_in(phrasing.when, moment, "en", rng)
            yield _phrased(f"long-{number:05d}-when-en", media_name("long", number), scene, phrasing, asked, rng)


def _phrased(
    name: str,
    video: str,
    scene: Scene,
    phrasing: Phrasing,
    asked: tuple[Question, Question],
    rng: random.Random,
) -> dict[str, Any]:
    """A record in the words of a phrasing: a question with options, one without, and a description."""
    turns = [  # one of each: these words are long, and a row of stage 5 is short
        phrasing.turn(asked[0]),
        phrasing.open_turn(asked[1]),
        describe(scene, "en", bool(scene.seconds) and rng.random() < 0.5),
    ]
    rng.shuffle(turns)
    made = record_of(name + PHRASED, turns, video)
    if phrasing.system:
        made["conversations"].insert(0, {"from": "system", "value": phrasing.system})
    return made


def write_records(
    plan: CorpusMixture, seed: int, media: dict[str, list[Scene]], phrasings: Sequence[Phrasing], root: Path
) -> None:
    """Write the files of the stages, of the warm-up and of the evaluation into `root`; `media` are scenes by folder."""
    rng = random.Random(f"{seed}/records")
    captions, told, long_told = (
        list(_captions(media, folder, dense, plan, stage))
        for folder, dense, stage in (("images", False, 1), ("short", plan.times_from <= 2, 2), ("long", True, 5))
    )
    rng.shuffle(captions)
    first, more = captions[: plan.stage1_captions], captions[plan.stage1_captions :][: plan.stage1_more]
    apart = captions[: plan.encoder_captions]
    scenes = {media_name(folder, i): scene for folder in ("short", "long") for i, scene in enumerate(media[folder])}

    def shorts(each: int, stage: int) -> list[dict[str, Any]]:
        return list(_instructions(media, "short", plan.shorts, each, plan, stage, rng))

    chats = shorts(plan.stage4_per_short, 4)
    lately = _with_others(chats, media, plan.some_images, plan, 4, rng)
    stages = [
        _with_others(more, media, plan.stage1_chats, plan, 1, rng),
        *(
            _with_others(told + shorts(plan.stage2_per_short, stage), media, plan.some_images, plan, stage, rng)
            for stage in (2, 3)
        ),
        lately,
    ]
    long_chats = list(_instructions(media, "long", plan.longs, plan.stage5_per_long, plan, 5, rng))
    again = min(plan.stage5_again, len(lately))
    stages.append(long_chats + long_told + rng.sample(lately, again))
    # Records in others' words stand behind all others, which stay what they are without them, as does the tokenizer.
    phrased, long_phrased = (list(_some_phrased(some, scenes, plan, phrasings, seed)) for some in (chats, long_chats))
    repeated = random.Random(f"{seed}/phrased").sample(phrased, len(phrased) * again // max(len(lately), 1))
    behind = {4: phrased, 5: [*long_phrased, *repeated, *_asked_when(media["long"][: plan.longs], phrasings, seed)]}
    for i, records in enumerate(stages, 1):
        rng.shuffle(records)
        _write(root / f"stage{i}.jsonl", [*(first if i == 1 else ()), *records, *behind.get(i, ())])
    _write(root / "stage0.jsonl", _warmup_records(plan, seed))
    if apart:
        _write(root / "captions.jsonl", apart)
    for name, folder in (("image", "images"), ("short", "short"), ("long", "long")):
        folder = f"held_out/{folder}"
        counts = getattr(plan, f"eval_{name}")
        _write(root / f"eval_{name}.jsonl", evaluation_records(media[folder], folder, counts, seed, plan.sentences))


def _with_others(
    records: list[dict[str, Any]],
    media: dict[str, list[Scene]],
    images: int,
    plan: CorpusMixture,
    stage: int,
    rng: random.Random,
) -> list[dict[str, Any]]:
    """Records of a stage, conversations on `images` images, and some without media, so that neither is forgotten."""
    texts = lesson(-1, plan.some_text, _text_maker(rng), rng, plan.short_kinds)
    told = [record_of(f"text-{i:05d}", turns) for i, turns in enumerate(texts)]
    return records + list(_instructions(media, "images", images, 1, plan, stage, rng)) + told


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_bytes(b"".join(map(json_line, records)))
