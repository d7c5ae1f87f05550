"""From a request's messages and its local files to the engine's prompt."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kangaroo_jax.config import DataConfig
from kangaroo_jax.data.annotations.conversation import Media
from kangaroo_jax.data.batches.sample import Recipe, frame_policy, plan_media, render_parts
from kangaroo_jax.data.media.video import MediaInfo, MediaRef
from kangaroo_jax.data.tokenizer import Tokenizer
from kangaroo_jax.errors import UserError
from kangaroo_jax.serving.failures import ApiError
from kangaroo_jax.serving.limits import Limits
from kangaroo_jax.serving.protocol import FrameWishes, Prompt

_CHARACTERS = 8  # of a token, more than they have in most texts
_PIECE = 1 << 16  # characters that are made tokens at a time, because some tokenizers hold up all threads
_CUT = 8  # tokens that a piece may have because it is cut off

Found = tuple[Media, tuple[float, ...]]  # a medium's local files, and the seconds of its frames where they are known


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A prompt, and what an answer to it has to know."""

    recipe: Recipe
    assumed: tuple[bool, ...]  # which media were taken to have one frame a second
    names: Mapping[str, str]  # where in the request the files come from, by their paths


class Prompts:
    """Makes prompts as training made samples."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: DataConfig,
        frames_per_group: int,
        tokens_per_group: int,
        probe: Callable[[str, str], MediaInfo],
        limits: Limits,
    ) -> None:
        """`config` is `config.data` of the model's stage; `probe` reads a file's length in a process of its own."""
        self.tokenizer = tokenizer
        self._per_group, self._tokens = frames_per_group, tokens_per_group
        self._probe, self._limits = probe, limits
        policy = frame_policy(config, frames_per_group)
        self.policy = policy.narrowed(max_frames=limits.max_frames) if limits.max_frames else policy

    def render(self, prompt: Prompt, found: Sequence[Found], names: Mapping[str, str]) -> Rendered:
        """The prompt; `found` are the media of `prompt.media`, in their order, `names` where their files come from.

        Raises:
            UserError: a file cannot be read.
            ApiError: there are more frames than the server takes.
        """
        refs = self._refs(prompt.frames, found)
        frames = sum(len(ref.times) for ref in refs)
        if frames > self._limits.max_request_frames:
            raise ApiError(
                f"{frames} frames in all, limit {self._limits.max_request_frames} (--max-request-frames): "
                "ask for fewer by media_io_kwargs.video.num_frames",
                param="messages",
                status=413,
                code="too_large",
            )
        left = iter(refs)
        turns = [
            (message.role, [part if isinstance(part, str) else next(left) for part in message.parts])
            for message in prompt.messages
        ]
        recipe = render_parts(
            turns,
            self.tokenizer,
            self._per_group,
            self._tokens,
            ask=prompt.add_generation_prompt,
            leave_open=prompt.continue_final_message,
        )
        return Rendered(recipe, tuple(bool(medium.frames) and not times for medium, times in found), names)

    def _refs(self, wishes: FrameWishes, found: Sequence[Found]) -> list[MediaRef]:
        count = wishes.nframes
        if count is not None:  # the frames of a group go together
            count = min(count, max(self.policy.max_frames, self.policy.long_max_frames))
            count += -count % self._per_group
        asked = dataclasses.asdict(wishes) | {"nframes": count, "sample_fps": 1.0}
        media = [dataclasses.replace(medium, **(asked if medium.kind == "video" else {})) for medium, _ in found]
        refs = plan_media(media, self.policy, self._per_group, self._probe)
        return [
            dataclasses.replace(ref, times=tuple(times[round(second)] for second in ref.times)) if times else ref
            for ref, (_, times) in zip(refs, found, strict=True)
        ]


def exceeds(tokenizer: Tokenizer, texts: Sequence[str], most: int) -> bool:
    """Whether texts have more than `most` tokens, found out with no more work than so many tokens take.

    False, too, where there may be a few more than that. A text that is not much longer than these is not looked at.
    """
    if sum(map(len, texts)) <= _CHARACTERS * most:
        return False
    count = 0
    for text in texts:
        for first in range(0, len(text), _PIECE):
            count += max(0, len(tokenizer.encode(text[first : first + _PIECE])) - _CUT)
            if count > most:
                return True
    return False


def without_paths(error: UserError, names: Mapping[str, str]) -> ApiError:
    """What a client is told of an error in its media: where in the request, and no path of this machine."""
    text, where = str(error), None
    for path, name in names.items():
        if path in text:
            text, where = text.replace(path, name), name
    return ApiError(text, param=where, code="unreadable_media" if where else None)


def seen(rendered: Rendered, frame_times: Sequence[Sequence[float]]) -> dict[str, Any]:
    """What an answer tells of the frames behind it: the `kangaroo` field."""
    media = []
    for ref, times, assumed in zip(rendered.recipe.media, frame_times, rendered.assumed, strict=False):
        told: dict[str, Any] = {"type": ref.kind, "frames": len(times)}
        if ref.kind == "video":
            told["seconds"] = [round(second, 3) for second in times]
            if assumed:
                told["assumed_fps"] = 1.0
        media.append(told)
    return {"media": media}
