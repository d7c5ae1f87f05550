"""A rule-based backend for generated corpora (`kangaroo_jax.corpus.make`), whose truth is known.

It reads no pixels: it makes the scenes again from the seed in the corpus's manifest and answers requests from them.
With it the whole path from clips to an instruction set runs, and is tested, without any model.
"""

import dataclasses
import functools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.corpus.make import scenes_of
from kangaroo_jax.corpus.scenes import Scene
from kangaroo_jax.corpus.text import Fact, ask, caption, dense_caption, facts, note, word
from kangaroo_jax.errors import UserError
from kangaroo_jax.llm_client.requests import Completion, Failure, Request

# Question types of `instruct.taxonomy`, and the corpus's questions for each.
TYPES = {
    "object": ("what",),
    "attribute": ("colour",),
    "count": ("count",),
    "motion": ("direction",),
    "order": ("first", "last"),
    "moment": ("second_t",),
    "duration": ("duration",),
}


class SceneRules:
    """Answers from the scenes of a corpus folder. `settings["view"]` is what a frame captioner mentions.

    "all" mentions thing, colour and place; "thing" leaves the place out, so that captioners differ.
    """

    cached = False

    def __init__(self, name: str, corpus: str, *, settings: Mapping[str, Any] | None = None) -> None:
        """Raises UserError if the folder is not a finished corpus."""
        self.name, self.model, self.settings = name, "scene-rules-1", dict(settings or {})
        self._folder = Path(corpus).resolve()
        self._scenes = _scenes(str(self._folder))

    async def complete(self, request: Request, images: tuple[bytes, ...], max_tokens: int, attempt: int) -> Completion:
        """See `Backend`. Raises Failure for a medium outside the corpus, or a task without rules."""
        task = request.task
        answer = {
            "frame_caption": self._frame,
            "video_caption": self._video,
            "question": self._question,
            "choose": self._choose,
            "recall": self._recall,
        }.get(str(task.get("name")))
        if answer is None:
            raise Failure("rules", f"no rule for the prompt {request.prompt}", transient=False)
        return Completion(answer(task))

    async def close(self) -> None:
        """See `Backend`."""

    def _scene(self, task: Mapping[str, Any]) -> Scene:
        media = Path(task["media"]).resolve()
        name = media.relative_to(self._folder).as_posix() if media.is_relative_to(self._folder) else ""
        if name not in self._scenes:
            raise Failure("rules", f"{media} is not a medium of the corpus {self._folder}", transient=False)
        scene = part_of(self._scenes[name], task.get("start"), task.get("end"))
        if not scene.events:
            raise Failure("rules", "nothing is visible in this part", transient=False)
        return scene

    def _frame(self, task: Mapping[str, Any]) -> str:
        scene, language = self._scene(task), task["language"]
        shown = [e for e in scene.seen(task["time"])] if scene.seconds else list(scene.events)
        if not shown:
            return "There is nothing." if language == "en" else "什么都没有。"
        still = dataclasses.replace(
            scene, seconds=0, direction="", events=tuple(_standing(e, task["time"]) for e in shown)
        )
        view = self.settings.get("view", "all")
        if view == "thing":
            names = [f"{word(e.thing.colour, language)} {word(e.thing.name, language)}" for e in still.events]
            phrase = (", " if language == "en" else "，").join(dict.fromkeys(names))
        else:
            phrase = note(still, language)
        return f"There is {phrase}." if language == "en" else f"有{phrase}。"

    def _video(self, task: Mapping[str, Any]) -> str:
        scene, language = self._scene(task), task["language"]
        answer = {"short": caption(scene, language), "detailed": dense_caption(scene, language)}
        return json.dumps(answer, ensure_ascii=False)

    def _question(self, task: Mapping[str, Any]) -> str:
        """A question about a fact of the type; without such a fact `fits` is false."""
        scene, language, rng = self._scene(task), task["language"], random.Random(task["seed"])
        rounds, used = [], set[tuple[str, str | int]]()
        for kind in task["types"]:
            fitting = [f for f in facts(scene) if f.kind in TYPES.get(kind, ()) and (f.question, f.about) not in used]
            if fitting:
                fact = rng.choice(fitting)
                used.add((fact.question, fact.about))
                rounds.append(_asked(fact, language, rng) | {"fits": True})
        if task["shape"] == "rounds":
            asked_rounds = [{"question": one["question"], "answer": one["answer"]} for one in rounds]
            asked_rounds += [{"question": "", "answer": ""}] * (2 - len(asked_rounds))
            return json.dumps({"fits": len(rounds) >= 2, "rounds": asked_rounds}, ensure_ascii=False)
        empty = {"fits": False, "question": "", "answer": "", "distractors": [""] * 3}
        one = rounds[0] if rounds else empty
        if task["shape"] == "open":
            one.pop("distractors")
        return json.dumps(one, ensure_ascii=False)

    def _choose(self, task: Mapping[str, Any]) -> str:
        """The right letter if the request contains the truth, else an arbitrary one."""
        options: Sequence[str] = task["options"]
        if task.get("truth") is not None:
            return json.dumps({"answer": "ABCDEFGH"[options.index(task["truth"])]})
        return json.dumps({"answer": random.Random("/".join((task["question"], *options))).choice("ABCD")})

    def _recall(self, task: Mapping[str, Any]) -> str:
        return json.dumps({"answer": "I do not know." if task["language"] == "en" else "不知道。"}, ensure_ascii=False)


def _asked(fact: Fact, language: str, rng: random.Random) -> dict[str, Any]:
    asked = ask(fact, language, rng, "A")
    text = asked.text.split("\n", 1)[0]
    return {"question": text, "answer": asked.options[0], "distractors": list(asked.options[1:])}


@functools.lru_cache(maxsize=4)
def _scenes(folder: str) -> dict[str, Scene]:
    if not (Path(folder) / "manifest.json").is_file():
        raise UserError(f"{folder}: no generated corpus (manifest.json is missing); give backends.NAME.corpus")
    return scenes_of(Path(folder))


def part_of(scene: Scene, start: float | None, end: float | None) -> Scene:
    """The part of a scene between two times, with times from the start of the part; it may have no events."""
    whole = max((e.end for e in scene.events), default=0.0) if scene.seconds else 0.0
    first, last = start or 0.0, min(end if end is not None else scene.seconds, scene.seconds)
    if not scene.seconds or (first < 0.5 and last > max(scene.seconds - 0.5, whole - 0.5)):
        return scene
    events = []
    for event in scene.events:
        begin, finish = max(event.start, first), min(event.end, last)
        if finish - begin < 0.25:
            continue  # a remainder from a cut that is off by a frame
        (x0, y0), (x1, y1) = event.at(begin), event.at(finish)
        changes: Mapping[str, Any] = dict(start=begin - first, end=finish - first, x0=x0, y0=y0, x1=x1, y1=y1)
        events.append(dataclasses.replace(event, **changes))
    kind = scene.kind
    if kind in ("order", "recolour", "transform") and len(events) < 2:
        kind = "still"
    if kind in ("appear", "disappear") and events and events[0].end - events[0].start > last - first - 0.5:
        kind = "still"
    return dataclasses.replace(scene, kind=kind, seconds=max(round(last - first), 1), events=tuple(events))


def _standing(event: Any, time: float) -> Any:
    """An event as one frame shows it: at its position at that time, without motion."""
    x, y = event.at(time) if event.end > event.start else (event.x0, event.y0)
    return dataclasses.replace(event, start=0.0, end=0.0, x0=x, y0=y, x1=x, y1=y)
