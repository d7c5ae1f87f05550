"""The corpus of the quickstart: real JPEG and H.264 files with captions, questions and conversations.

`make_corpus(folder, seed, scale)` writes into `folder`

    media/images, media/short, media/long       training media, and the same three under media/held_out
    stage0.jsonl                                text only: notes in place of videos (stands in for Llama-3)
    stage1.jsonl ... stage5.jsonl               LLaVA records of the five stages
    eval_image.jsonl, eval_short.jsonl, eval_long.jsonl   held-out media, one question a record
    manifest.json                               settings and counts; it is written last

The text warm-up names every combination of thing and colour, as any pretrained decoder would know them; the
combinations held out are of pixels. The same seed and scale give the same records and the same pixels.
"""

import dataclasses
import itertools
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.corpus.draw import split_scans, write_media
from kangaroo_jax.corpus.records import evaluation_records, media_name, record_of
from kangaroo_jax.corpus.scenes import Scene, SceneMaker
from kangaroo_jax.corpus.sentences import as_a_sentence, in_a_sentence
from kangaroo_jax.corpus.text import LANGUAGES, Phrasing, ask, chinese_words, describe, some_facts
from kangaroo_jax.corpus.warmup import lesson, warmup_turns
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.json_text import json_line, read_objects
from kangaroo_jax.system.processes import Lost, WorkerPool
from kangaroo_jax.system.progress import Tell

FORMAT = 6  # of the files; raise it when the same settings begin to give other records
_PHRASED = "-phrased"  # ends the name of a record that is put in others' words


@dataclasses.dataclass(frozen=True)
class CorpusMixture:
    """How much of what. Counts are for scale 1; shares are from 0 to 1; kinds have relative weights."""

    # Media
    images: int = 12_000
    shorts: int = 3000
    longs: int = 400
    held_images: int = 60
    held_shorts: int = 120
    held_longs: int = 60
    short_fps: int = 4
    long_fps: int = 2
    image_kinds: tuple[tuple[str, float], ...] = (("image", 5), ("image_aside", 2), ("image_count", 3))
    short_kinds: tuple[tuple[str, float], ...] = (
        ("still", 1),
        ("count", 4),
        ("move", 5),
        ("order", 7),
        ("recolour", 1),
        ("transform", 1),
        ("appear", 1),
        ("disappear", 1),
    )
    # Conversations
    rounds: int = 6  # questions about one image or video in one conversation, at most
    long_rounds: int = 9  # about a long video, whose frames cost much more than its questions
    multiple_choice: float = 0.4  # share of the questions; the others are open
    describe_last: float = 0.15  # share of conversations that end with a description
    stage1_captions: int = 4000  # captions of images that stage 1 begins with; conversations on every image follow,
    stage1_more: int = 3000  # and so many captions among them
    stage2_per_short: int = 4  # conversations of a short clip in stages 2 and 3; languages take turns
    stage4_per_short: int = 6
    some_images: int = 2500  # images with a conversation, again, in each of stages 2 to 4
    some_text: int = 700  # conversations without media in each of stages 1 to 4, of the last lesson of the warm-up
    stage5_per_long: int = 10
    stage5_again: int = 5000  # conversations of stage 4 repeated in stage 5
    phrased: float = 0.01  # share of the conversations on videos in stages 4 and 5 that are put in others' words
    chinese: tuple[float, ...] = (0.5, 0.5, 0.5, 0.5, 0.5)  # share of the conversations of each stage
    sentences: bool = False  # questions and answers are whole sentences
    every_fact: bool = False  # easy facts are asked as often as others
    # Text warm-up
    warmup: float = 1.0  # times the records of `corpus_warmup.LESSONS`
    # Evaluation: questions in both languages together
    eval_image: tuple[int, int] = (80, 40)  # multiple choice, open
    eval_short: tuple[int, int] = (400, 200)
    eval_long: tuple[int, int] = (160, 80)

    def scaled(self, scale: float) -> "CorpusMixture":
        """The same mixture with every count multiplied, never below a handful; what is left out stays left out."""
        media = ("images", "shorts", "longs", "held_images", "held_shorts", "held_longs")
        records = ("stage1_captions", "stage1_more", "some_images", "some_text", "stage5_again")
        given = {name: getattr(self, name) for name in (*media, *records)}
        counts: dict[str, Any] = {name: max(round(n * scale), 4) if n else 0 for name, n in given.items()}
        for name in ("eval_image", "eval_short", "eval_long"):
            counts[name] = tuple(max(round(n * scale / 8) * 8, 8) for n in getattr(self, name))
        return dataclasses.replace(self, warmup=self.warmup * scale, **counts)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Where the files of a finished corpus are. Records name their media relative to `folder`."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def warmup(self) -> Path:
        """Text-only conversations of the warm-up: `stage0.jsonl`."""
        return self.folder / "stage0.jsonl"

    @property
    def stages(self) -> tuple[Path, ...]:
        """Records of stages 1 to 5."""
        return tuple(self.folder / f"stage{i}.jsonl" for i in range(1, 6))

    @property
    def eval_files(self) -> dict[str, Path]:
        """Held-out questions on `image`, `short` and `long` media."""
        return {name: self.folder / f"eval_{name}.jsonl" for name in ("image", "short", "long")}

    def chat_examples(self) -> list[tuple[str, Path, list[str]]]:
        """(title, held-out video, questions) of a chat about a short and one about a long video.

        The questions begin in English and end in Chinese.
        """
        short = ["Describe the video.", "What comes first?", "How many seconds are there?", "最后出现什么？"]
        long = ["What comes first?", "What comes last?", "How many seconds are there?", "按时间描述视频。"]
        examples = []
        for title, name, questions in (("A short video", "short", short), ("A long video", "long", long)):
            records = read_records(self.eval_files[name])
            fitting = [r for r in records if r["question_kind"] == "last"] or records
            examples.append((title, self.folder / fitting[0]["video"], questions))
        return examples

    def questions(self, name: str) -> list[tuple[Path, str]]:
        """(held-out medium, question) of an evaluation file; `name` is image, short or long."""
        return [
            (
                self.folder / (record.get("video") or record["image"]),
                record["conversations"][0]["value"].split("\n", 1)[1],
            )
            for record in read_records(self.eval_files[name])
        ]

    def texts_for_tokenizer(self, limit: int = 6000) -> Iterator[str]:
        """Text for a SentencePiece model: turns of the first `limit` records of each stage, cut into words.

        Words and numbers stand alone as well as in their sentences, and Chinese only alone, so that no piece spans
        two words or a word and its full stop. What is put in others' words is left out: it takes no piece from these.
        """
        english, numbers = set[str](), set[str]()
        for path in (self.warmup, *self.stages):
            for record in itertools.islice(read_objects(path), limit):
                if record["id"].endswith(_PHRASED):
                    continue
                for turn in record["conversations"]:
                    text = turn["value"].replace("<video>\n", "").replace("<image>\n", "")
                    numbers.update(re.findall("[0-9]+", text))
                    if text.isascii():
                        english.update(re.findall("[A-Za-z]+", text))
                        yield re.sub(r"(?<=\w)(?=[^\w\s])", "\n", text)
        for _ in range(limit // 10):
            yield from ("user", "assistant", "system", *sorted(english), *sorted(numbers), *chinese_words())
            yield from (f"{word} B" for word in chinese_words())  # as an answer says it


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file of this corpus."""
    return list(read_objects(path))


def scenes_of(folder: Path) -> dict[str, Scene]:
    """The scene of every medium of a finished corpus, by its path relative to the folder: what is true of it.

    Raises UserError where the corpus was made by another version of this module.
    """
    settings = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["settings"]
    if settings["format"] != FORMAT:
        raise UserError(f"{folder}: a corpus of format {settings['format']}, and this is format {FORMAT}; make it anew")
    plan = _plan_media(CorpusMixture(**settings["mixture"]), settings["seed"])
    return {media_name(name, i): scene for name, scenes in plan.items() for i, scene in enumerate(scenes)}


def make_corpus(
    folder: str | Path,
    seed: int = 0,
    scale: float = 1.0,
    *,
    mixture: CorpusMixture | None = None,
    phrasings: Sequence[Phrasing] = (),
    processes: int = 2,
    tell: Tell = print,
) -> Corpus:
    """Write the corpus into `folder`, or find the finished one there.

    `scale` multiplies every count; `phrasings` are the words of `CorpusMixture.phrased`. Media are drawn in
    `processes` processes (1 draws in this one). The files
    stand in a temporary folder until all are written. Raises UserError where `folder` holds a corpus of other
    settings, or other files.
    """
    plan = (mixture or CorpusMixture()).scaled(scale)
    words = [dataclasses.asdict(phrasing) for phrasing in phrasings]
    settings = dict(format=FORMAT, seed=seed, mixture=json.loads(json.dumps(dataclasses.asdict(plan))), phrasings=words)
    folder = Path(folder)
    manifest = folder / "manifest.json"
    if manifest.is_file():
        found = json.loads(manifest.read_text())
        if found["settings"] != settings:
            raise UserError(
                f"{folder}: a corpus of other settings (seed or counts); remove it or choose another folder"
            )
        return Corpus(folder, found)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: holds files that are no finished corpus; remove it or choose another folder")
    start, temporary = time.monotonic(), folder.with_name(folder.name + ".partial")
    if temporary.exists():
        shutil.rmtree(temporary)
    media = _plan_media(plan, seed)
    _draw_all(media, temporary, processes, plan, lambda: _write_records(plan, seed, media, phrasings, temporary), tell)
    counts = {p.name: len(read_records(p)) for p in sorted(temporary.glob("*.jsonl"))}
    counts.update({name: len(scenes) for name, scenes in media.items()})
    made = dict(settings=settings, counts=counts, seconds=round(time.monotonic() - start, 1))
    (temporary / "manifest.json").write_text(json.dumps(made, indent=1) + "\n")
    temporary.replace(folder)
    tell(f"corpus: {len(media)} folders of media and {sum(counts.values())} files and records in {made['seconds']} s")
    return Corpus(folder, made)


# ---------------------------------------------------------------------------------------------- media


def _plan_media(plan: CorpusMixture, seed: int) -> dict[str, list[Scene]]:
    """Scenes of each folder of media; the number of a scene is the name of its file."""
    scans = split_scans()
    folders = {
        "images": ("train", plan.images, plan.image_kinds),
        "short": ("train", plan.shorts, plan.short_kinds),
        "long": ("train", plan.longs, (("long", 1.0),)),
        "held_out/images": ("eval", plan.held_images, plan.image_kinds),
        "held_out/short": ("eval", plan.held_shorts, plan.short_kinds),
        "held_out/long": ("eval", plan.held_longs, (("long", 1.0),)),
    }
    media = {}
    for folder, (split, count, kinds) in folders.items():
        maker = SceneMaker(split, scans[split], random.Random(f"{seed}/{folder}"))
        media[folder] = [maker.make(kind) for kind in _spread(kinds, count)]
    return media


def _spread(weights: Sequence[tuple[str, float]], count: int) -> list[str]:
    """`count` names in the proportions of their weights, evenly interleaved."""
    total, given = sum(w for _, w in weights), dict.fromkeys((name for name, _ in weights), 0)
    order = []
    for i in range(1, count + 1):
        name = max(weights, key=lambda pair: pair[1] / total * i - given[pair[0]])[0]
        given[name] += 1
        order.append(name)
    return order


def _draw_all(
    media: dict[str, list[Scene]],
    root: Path,
    processes: int,
    plan: CorpusMixture,
    meanwhile: Callable[[], None],
    tell: Tell,
) -> None:
    """Write all media in `processes` processes, while this one writes the text."""
    work = []
    for folder, scenes in media.items():
        (root / "media" / folder).mkdir(parents=True)
        fps = plan.long_fps if folder.endswith("long") else plan.short_fps
        work += [(scene, str(root / media_name(folder, i)), fps) for i, scene in enumerate(scenes)]
    tell(f"corpus: writing {len(work)} images and videos")
    if processes == 1:
        write_media(work)
        meanwhile()
        return
    pool = WorkerPool(write_media, processes, float("inf"))
    try:
        drawn = [pool.submit(work[i::processes]) for i in range(processes)]
        meanwhile()
        for part in drawn:
            part.result()
    except Lost as error:
        raise RuntimeError(f"a process that draws the corpus {error}; its message stands above") from None
    finally:
        pool.close()


# ---------------------------------------------------------------------------------------------- records


def _questions(scene: Scene, language: str, plan: CorpusMixture, rng: random.Random) -> list[tuple[str, str]]:
    """Rounds of questions on one scene, each fact at most once, sometimes with a description at the end."""
    rounds = plan.long_rounds if scene.kind == "long" else plan.rounds
    chosen = some_facts(scene, rounds, rng, plan.every_fact)
    asked = [ask(fact, language, rng, "?" if rng.random() < plan.multiple_choice else "") for fact in chosen]
    if plan.sentences:
        asked = [in_a_sentence(question, fact) for question, fact in zip(asked, chosen, strict=True)]
    turns = [(q.text, q.told) for q in asked]
    if rng.random() < plan.describe_last:
        turns.append(_description(scene, language, bool(scene.seconds) and rng.random() < 0.5, plan))
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
            yield record_of(name, [_description(scene, language, dense, plan)], media_name(folder, i))


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
            turns = _questions(scene, language, plan, rng)
            yield record_of(f"{folder}-{i:05d}-chat-{k}-{language}", turns, media_name(folder, i))


def _some_phrased(
    records: Iterable[dict[str, Any]],
    scenes: dict[str, Scene],
    plan: CorpusMixture,
    phrasings: Sequence[Phrasing],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """The records, a share `plan.phrased` of them replaced by questions with options in the words of a phrasing.

    English ones alone: the phrasings are in English. Each begins with its system's text, if it has one. It asks
    with options, without options in the same words, and for a description, in any order: a letter ends the answers
    to options, not those to unusual words.
    """
    for record in records:
        rng = random.Random(f"{seed}/phrased/{record['id']}")
        if not phrasings or not record["id"].endswith("-en") or rng.random() >= len(LANGUAGES) * plan.phrased:
            yield record
            continue
        phrasing, scene = rng.choice(phrasings), scenes[record["video"]]
        facts = some_facts(scene, 2, rng)
        turns = [  # one of each: these words are long, and a row of stage 5 is short
            phrasing.turn(ask(facts[0], "en", rng, "?")),
            phrasing.open_turn(ask(facts[-1], "en", rng)),
            describe(scene, "en", bool(scene.seconds) and rng.random() < 0.5),
        ]
        rng.shuffle(turns)
        made = record_of(record["id"] + _PHRASED, turns, record["video"])
        if phrasing.system:
            made["conversations"].insert(0, {"from": "system", "value": phrasing.system})
        yield made


def _write_records(
    plan: CorpusMixture, seed: int, media: dict[str, list[Scene]], phrasings: Sequence[Phrasing], root: Path
) -> None:
    rng = random.Random(f"{seed}/records")
    captions, dense, long_dense = (
        list(_captions(media, folder, dense, plan, stage))
        for folder, dense, stage in (("images", False, 1), ("short", True, 2), ("long", True, 5))
    )
    rng.shuffle(captions)
    first, more = captions[: plan.stage1_captions], captions[plan.stage1_captions :][: plan.stage1_more]
    scenes = {media_name(folder, i): scene for folder in ("short", "long") for i, scene in enumerate(media[folder])}

    def shorts(each: int, stage: int) -> list[dict[str, Any]]:
        return list(_instructions(media, "short", plan.shorts, each, plan, stage, rng))

    last = list(_some_phrased(shorts(plan.stage4_per_short, 4), scenes, plan, phrasings, seed))
    lately = _with_others(last, media, plan.some_images, plan, 4, rng)
    stages = [
        _with_others(more, media, plan.images, plan, 1, rng),
        *(
            _with_others(dense + shorts(plan.stage2_per_short, stage), media, plan.some_images, plan, stage, rng)
            for stage in (2, 3)
        ),
        lately,
        list(
            _some_phrased(
                _instructions(media, "long", plan.longs, plan.stage5_per_long, plan, 5, rng),
                scenes,
                plan,
                phrasings,
                seed,
            )
        )
        + long_dense
        + rng.sample(lately, min(plan.stage5_again, len(lately))),
    ]
    for i, records in enumerate(stages, 1):
        rng.shuffle(records)
        _write(root / f"stage{i}.jsonl", first + records if i == 1 else records)
    _write(root / "stage0.jsonl", _warmup_records(plan, seed))
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
