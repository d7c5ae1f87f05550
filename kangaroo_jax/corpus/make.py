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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.corpus.conversations import PHRASED, write_records
from kangaroo_jax.corpus.draw import split_scans, write_media
from kangaroo_jax.corpus.mixture import CorpusMixture
from kangaroo_jax.corpus.records import media_name
from kangaroo_jax.corpus.scenes import Scene, SceneMaker
from kangaroo_jax.corpus.text import Phrasing, chinese_words
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.json_text import read_objects
from kangaroo_jax.system.processes import Lost, WorkerPool
from kangaroo_jax.system.progress import Tell

FORMAT = 7  # of the files; raise it when the same settings begin to give other records


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
    def captions(self) -> Path:
        """Captions of images for the warm-up of an encoder: `captions.jsonl`, where the mixture has any."""
        return self.folder / "captions.jsonl"

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
                if record["id"].endswith(PHRASED):
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
            other = [name for name in settings if found["settings"].get(name) != settings[name]]
            raise UserError(f"{folder}: a corpus of another {' and '.join(other)}; remove it or choose another folder")
        return Corpus(folder, found)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: holds files that are no finished corpus; remove it or choose another folder")
    start, temporary = time.monotonic(), folder.with_name(folder.name + ".partial")
    if temporary.exists():
        shutil.rmtree(temporary)
    media = _plan_media(plan, seed)
    _draw_all(media, temporary, processes, plan, lambda: write_records(plan, seed, media, phrasings, temporary), tell)
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
