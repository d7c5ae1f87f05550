"""VideoVista (arXiv:2406.11303), and VideoVista-CulturalLingo, in Chinese and English (arXiv:2504.17821)."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kangaroo_jax.data.annotations.conversation import Media
from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.benchmarks import files
from kangaroo_jax.evaluation.benchmarks.question import Benchmark, Question, Reading
from kangaroo_jax.evaluation.benchmarks.wording import WORDINGS
from kangaroo_jax.evaluation.extraction import harnesses
from kangaroo_jax.evaluation.extraction.strict import LETTERS

_IMAGES = ("relation_images", "images")  # folders of the images of Relation Reasoning-Image
_MINUTES = (0, 1, 2, 5, 10)  # where the buckets of length begin
_COLUMNS = ("question_id", "video_name", "category", "Type", "Question", "Answer_Choices")


def read(folder: Path) -> Iterator[Question]:
    """The questions of `VideoVista.json`."""
    for where, row in files.rows(files.found(folder, "VideoVista.json"), (*_COLUMNS, "Answer")):
        options = files.plain_options(files.texts(where, row, "Answer_Choices"))
        place = row["Answer"]
        if not isinstance(place, int) or not 0 <= place < len(options):
            raise UserError(f"{where}: Answer is {place!r}, but there are {len(options)} choices")
        name, category, kind = str(row["video_name"]), str(row["category"]), str(row["Type"])
        part = name.split(".")[1] if name.count(".") > 1 else ""
        bases = (f"merged/{category}/{part}", f"merged/{category}", "merged", "videos", "")
        media, fault = [Media("video", files.video(folder, [f"{base}/{name}" for base in bases]))], ""
        if row.get("image_name"):
            media.append(Media("image", files.video(folder, [f"{base}/{row['image_name']}" for base in _IMAGES])))
        elif kind == "Relation Reasoning-Image":
            fault = f"{where}: asks about an image, but has no image_name; it is asked without"
        minutes = max(files.number(where, row, "time"), 0.0) / 60
        yield Question(
            str(row["question_id"]),
            tuple(media),
            str(row["Question"]),
            options,
            LETTERS[place],
            groups={
                "part": ("reasoning" if "Reasoning" in kind else "understanding",),
                "type": (kind,),
                "minutes from": (str(max(start for start in _MINUTES if start <= minutes)),),
                "category": (category,),
            },
            fault=fault,
            row=row,
        )


def read_culturallingo(folder: Path) -> Iterator[Question]:
    """The questions of `VideoVista-CulturalLingo.json`, each with its exact prompt."""
    path = files.found(folder, "VideoVista-CulturalLingo.json", "*CulturalLingo*.json")
    for where, row in files.rows(path, ("question_id", "processed_question", "answer", "category", "subcategory")):
        video = next((str(row[key]) for key in ("video_path", "video_name", "video") if row.get(key)), "")
        if not video:
            raise UserError(f"{where}: names no video (video_path, video_name or video)")
        prompt = str(row["processed_question"])
        options = tuple(line for line in prompt.splitlines() if line[:2] in {f"{letter}." for letter in LETTERS})
        language = str(row.get("language") or ("zh" if any("\u3400" <= c <= "\u9fff" for c in prompt) else "en"))
        yield Question(
            str(row["question_id"]),
            (Media("video", files.video(folder, [f"{base}/{video}" for base in ("videos", "video", ".")])),),
            prompt,
            files.plain_options(options) or tuple("ABCD"),
            str(row["answer"]),
            groups={key: (str(row[key]),) for key in ("category", "subcategory")} | {"language": (language,)},
            prompt=prompt,
        )


def submission(answers: Iterable[tuple[Question, str]]) -> tuple[str, Any]:
    """The file of the official script: each row with the model's answer."""
    return "videovista.json", [{**question.row, "Model_Answer": letter} for question, letter in answers]


_FIRST = {"official": {"choice": Reading(harnesses.first_character)}}
VIDEOVISTA = Benchmark(
    name="videovista",
    title="VideoVista",
    read=read,
    fetch="huggingface.co/datasets/Uni-MoE/VideoVista: VideoVista.json, merged/CATEGORY/PART/VIDEO and "
    "relation_images/IMAGE from the zips",
    licence="see its page",
    size="3,400 videos",
    questions=0,
    wordings=WORDINGS["videovista"],
    readings=_FIRST,
    published={"score": 69.5},
    note="the prompt is a public re-implementation's; the image of a question of Relation Reasoning-Image stands "
    "behind the video; frames of the published row are not public",
    submission=submission,
)
CULTURALLINGO = Benchmark(
    name="videovista-culturallingo",
    title="VideoVista-CulturalLingo",
    read=read_culturallingo,
    fetch="huggingface.co/datasets/Uni-MoE/VideoVista-CulturalLingo: VideoVista-CulturalLingo.json, the joined zip "
    "in videos/",
    licence="see its page",
    size="1,389 videos",
    questions=3134,
    wordings=WORDINGS["videovista-culturallingo"],
    readings=_FIRST,
)
