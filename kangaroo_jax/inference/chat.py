"""Talk with a trained model about videos and images.

kangaroo = Kangaroo.load("runs/quickstart")
answer, history = kangaroo.chat(video="a.mp4", query="What happens?")
answer, history = kangaroo.chat(query="And then?", history=history)
"""

import collections
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from ml_collections import ConfigDict

from kangaroo_jax.config import ModelConfig, frames_per_group, tokens_per_group
from kangaroo_jax.data.annotations.conversation import Conversation, Media, Turn, count_tags
from kangaroo_jax.data.batches.sample import Recipe, render_prompt
from kangaroo_jax.data.media.addresses import short
from kangaroo_jax.data.media.decode import ThreadDecoder
from kangaroo_jax.data.media.image import opened_image
from kangaroo_jax.data.media.kinds import kind_of, read_head
from kangaroo_jax.data.media.storage import MEMBER, join
from kangaroo_jax.data.media.video import MediaRef, folder_of_frames, probe_cached
from kangaroo_jax.data.tokenizer import Tokenizer, load_tokenizer
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.generate import Generator, Prompts, bucket
from kangaroo_jax.inference.sampling import Sampling
from kangaroo_jax.models import kangaroo as models
from kangaroo_jax.system.cpus import usable_cpus

Item = TypeVar("Item")
Result = TypeVar("Result")
History = list[dict[str, Any]]
AnyPath = str | Path
Video = AnyPath | Sequence[AnyPath]  # what shows it, or its frames as images
MediaOfOne = tuple[MediaRef, ...]  # what one prompt looks at
VIDEOS_REMEMBERED = 4  # whose vision tokens stay on the device for the next round


class Kangaroo:
    """A model, its tokenizer and the frame sampling that it was trained with."""

    def __init__(self, model: models.KangarooModel, config: ConfigDict, tokenizer: Tokenizer) -> None:
        """`config` is that of the stage which trained the model; see `load`."""
        self.config = config
        self.tokenizer = tokenizer
        self._generator = Generator(model)
        sizes = ModelConfig.from_config(config.model)
        self._frames_per_group = frames_per_group(sizes)
        self._tokens_per_group = tokens_per_group(sizes, config.data.image_size)
        self._decoder = ThreadDecoder(usable_cpus())
        self._seen: collections.OrderedDict[Any, jax.Array] = collections.OrderedDict()

    @classmethod
    def load(cls, path: str | Path) -> "Kangaroo":
        """Load what training wrote: a curriculum's folder (its last stage), a stage's, or one checkpoint.

        Raises:
            UserError: there is no checkpoint or tokenizer, or it is of another model than its config.
        """
        from kangaroo_jax.checkpoints.reading import load_for_inference

        model, config, tokenizer = load_for_inference(path)
        return cls(model, config, load_tokenizer(tokenizer))

    def chat(
        self,
        video: Video | None = None,
        image: AnyPath | None = None,
        query: str = "",
        history: History | None = None,
        *,
        temperature: float = 0.0,
        top_p: float = 0.9,
        max_new_tokens: int = 512,
        seed: int = 0,
        start: float | None = None,
        end: float | None = None,
    ) -> tuple[str, History]:
        """Answer a query about a video, an image, both, or what the history is about.

        Args:
            video, image: files, addresses or members of containers (`data.storage`). A video may also be a folder
                or a list of images. They stand before the query, or where it says `<video>` and `<image>`.
            query: what to ask.
            history: what the last round returned (JSON-able); its videos need not be given again.
            temperature: 0 always takes the likeliest token.
            top_p: draw among the likeliest tokens that have this probability together.
            max_new_tokens: longest answer.
            seed: of the drawing.
            start, end: seconds of the video to look at.

        Returns:
            The answer, and the history with this round in it.

        Raises:
            UserError: the query is empty, a file cannot be read, or a value is out of range.
        """
        turns = [*(history or []), ask(query, video, image, start, end)]
        sampling = Sampling(temperature, top_p, seed)
        pieces = self.stream(turns, sampling, max_new_tokens=max_new_tokens, every=max_new_tokens)
        answer = "".join(pieces).strip()
        return answer, [*turns, {"role": "assistant", "text": answer}]

    def stream(
        self, turns: History, sampling: Sampling | None = None, *, max_new_tokens: int = 512, every: int = 1
    ) -> Iterator[str]:
        """The answer to the last of `turns` (a history and what `ask` returns) in pieces of `every` tokens.

        A piece never ends inside a character. Raises UserError, see `chat`.
        """
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}: must be at least 1")
        recipe = self.recipe(conversation(turns))
        stream = self._generator.stream(
            Prompts.from_recipes([recipe], tokens=bucket(len(recipe.tokens))),
            self._vision(recipe.media),
            max_new_tokens=max_new_tokens,
            stop_ids=self.tokenizer.stop_ids,
            sampling=sampling,
            every=every,
        )
        text = shown = ""
        for (ids,) in stream:
            text = self.tokenizer.decode(ids)
            if not text.endswith("\ufffd") and text.startswith(shown):  # bytes of a whole character
                yield text[len(shown) :]
                shown = text
        yield text[len(shown) :]

    def answer_many(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int = 64,
        batch_size: int = 16,
        sampling: Sampling | None = None,
    ) -> list[str]:
        """The answers to many questions, in their order; greedy by default.

        Each conversation ends with the user's turn (`Conversation.split_answer`). Questions of like size are
        answered together, `batch_size` at a time, while the next ones' frames are decoded; media that several
        of them ask about are decoded and looked at once.

        Raises:
            UserError: a file cannot be read; the message names it.
        """
        with ThreadPoolExecutor(usable_cpus()) as pool:
            recipes = list(pool.map(self.recipe, conversations))
        order = sorted(range(len(recipes)), key=lambda i: _size(recipes[i]))
        groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        decoded = _one_ahead(self._decode, [_media_of(recipes[i] for i in group) for group in groups])
        answers = [""] * len(recipes)
        for group, (frames, times, first_rows) in zip(groups, decoded, strict=True):
            batch = [recipes[i] for i in group]
            prompts = Prompts.from_recipes(
                batch,
                tokens=bucket(max(len(recipe.tokens) for recipe in batch)),
                first_rows=[first_rows[recipe.media] for recipe in batch],
                rows=min(batch_size, bucket(len(recipes), smallest=1)),
            )
            vision = self._generator.encode(frames, times) if len(frames) else None
            ids = self._generator.generate(
                prompts, vision, max_new_tokens=max_new_tokens, stop_ids=self.tokenizer.stop_ids, sampling=sampling
            )
            for i, answer in zip(group, ids, strict=False):  # the batch may end in empty rows
                answers[i] = self.tokenizer.decode(answer).strip()
        return answers

    def recipe(self, conversation: Conversation) -> Recipe:
        """The prompt of a conversation that ends with the user's turn. Raises UserError."""
        return render_prompt(
            conversation, self.tokenizer, self.config.data, self._frames_per_group, self._tokens_per_group
        )

    def _decode(self, media: Sequence[MediaOfOne]) -> tuple[np.ndarray, np.ndarray, dict[MediaOfOne, int]]:
        """Decode the media of prompts, each once.

        Returns frames uint8[F, S, S, 3], their seconds float32[F], and the vision row at which each begins.
        Raises UserError.
        """
        side = self.config.data.image_size
        frames, times, first_rows, row = [np.zeros((0, side, side, 3), np.uint8)], [np.zeros(0)], {}, 0
        refs = [ref for one in media for ref in one]
        for outcome in self._decoder.decode(refs, side):
            if isinstance(outcome, UserError):
                raise outcome
            frames.append(outcome.pixels)
            times.append(outcome.times)
        for one in media:
            first_rows[one] = row
            row += sum(len(ref.times) for ref in one) // self._frames_per_group * self._tokens_per_group
        return np.concatenate(frames), np.concatenate(times).astype(np.float32), first_rows

    def _vision(self, media: MediaOfOne) -> jax.Array | None:
        """The vision tokens of a prompt's media, remembered for the rounds to come."""
        if not media:
            return None
        key = tuple((ref, *map(_version, ref.frames or (ref.path,))) for ref in media)
        if key not in self._seen:
            frames, times, _ = self._decode([media])
            self._seen[key] = self._generator.encode(frames, times)
        self._seen.move_to_end(key)
        while len(self._seen) > VIDEOS_REMEMBERED:
            self._seen.popitem(last=False)
        return self._seen[key]


def _version(path: str) -> int:
    """A number that changes with a file, or with the container that a member is in; 0 for an address."""
    for place in (path, path.partition(MEMBER)[0]):
        with contextlib.suppress(OSError):
            return os.stat(place).st_mtime_ns
    return 0


def _size(recipe: Recipe) -> tuple[int, list[str], int]:
    """Sorts prompts so that those of like size, and of them those about the same files, are neighbours."""
    return recipe.frames, [ref.path for ref in recipe.media], len(recipe.tokens)


def _media_of(recipes: Iterable[Recipe]) -> list[MediaOfOne]:
    """What the recipes look at, each once, in order."""
    return list(dict.fromkeys(recipe.media for recipe in recipes))


def _one_ahead(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """function(item) for each, where the next one is under way in a thread while one is used."""
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for item in items:
            following = thread.submit(function, item)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


# ---------------------------------------------------------------------------------- history


def ask(
    query: str,
    video: Video | None = None,
    image: AnyPath | None = None,
    start: float | None = None,
    end: float | None = None,
) -> dict[str, Any]:
    """A turn of the user, as it stands in a history. Raises UserError, also for files that cannot be opened."""
    if not query.strip():
        raise UserError("the query is empty: say what to ask")
    media: list[dict[str, Any]] = []
    if video is not None:
        media.append(_video(video) | {"start": start, "end": end})
    elif start is not None or end is not None:
        raise UserError("start and end belong to a video, and none is given")
    if image is not None:
        media.append({"kind": "image", "path": _opened(image, "image")})
    wanted = count_tags([Turn("user", query)])
    if not wanted:
        query = "".join(f"<{medium['kind']}>\n" for medium in media) + query
    elif sorted(wanted) != sorted(medium["kind"] for medium in media):
        raise UserError(f"the query has the tags {', '.join(wanted)}, but {len(media)} files are given with it")
    else:
        media.sort(key=lambda medium: wanted.index(medium["kind"]))
    return {"role": "user", "text": query, "media": media}


def _video(video: Video) -> dict[str, Any]:
    """What a history says of a video: its path, and its frames where it is a list of images."""
    if isinstance(video, (str, Path)):
        if os.path.isdir(video):
            for frame in folder_of_frames(video):
                _opened(frame, "image")
            return {"kind": "video", "path": str(video)}
        return {"kind": "video", "path": _opened(video, "video")}
    frames = [_opened(frame, "image") for frame in video]
    if not frames:
        raise UserError("the list of the video's frames is empty")
    return {"kind": "video", "path": frames[0], "frames": frames}


def _opened(path: AnyPath, kind: str) -> str:
    """The path of something that can be opened as a `kind`. Raises UserError where it is none, or rather the other."""
    text = str(path)
    if text.startswith("file://"):
        text = join("", text)
    try:
        info = probe_cached(text, kind)
    except UserError:
        if kind == "image" and _is_video(text):
            raise UserError(f"{short(text)}: this is a video; give it as video") from None
        raise
    if kind == "video" and info.seconds <= 1.0 and _is_still(text):
        raise UserError(f"{short(text)}: this is a still image; give it as image")
    return text


def _is_video(path: str) -> bool:
    """Whether it is a video, and no picture that FFmpeg alone can read."""
    with contextlib.suppress(UserError):
        return kind_of(read_head(path)) == "video" or probe_cached(path, "video").seconds > 1.0
    return False


def _is_still(path: str) -> bool:
    """Whether it is an image of one frame, which FFmpeg takes for a short video."""
    with contextlib.suppress(UserError), opened_image(path) as image:
        return getattr(image, "n_frames", 1) == 1
    return False


def conversation(turns: History) -> Conversation:
    """A history and the new turn as the data pipeline wants it. Raises UserError where it is no history."""
    fields = {field.name for field in dataclasses.fields(Media)}
    spoken, media = [], []
    for number, turn in enumerate(turns):
        try:
            role, text, refs = turn["role"], turn["text"], turn.get("media") or []
            media += [Media(**ref | {"frames": tuple(ref.get("frames", ()))}) for ref in refs if set(ref) <= fields]
        except (TypeError, KeyError, AttributeError):
            raise UserError(f"history: turn {number + 1} is none of those that chat returns") from None
        if role != ("user", "assistant")[number % 2]:
            raise UserError(f"history: turn {number + 1} is the {role}'s; user and assistant take turns")
        spoken.append(Turn(role, text))
    if count_tags(spoken) != [medium.kind for medium in media]:
        raise UserError("history: the tags in its turns and the media that it names do not match")
    return Conversation("chat", tuple(spoken), tuple(media))
