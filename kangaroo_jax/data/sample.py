"""From a conversation to a recipe: token ids, loss weights and which moments of which files to decode.

A recipe holds no pixels, so that recipes can be packed, reordered and thrown away cheaply.

The text is Llama-3's chat template, without a system prompt unless the conversation has one:

    <|begin_of_text|><|start_header_id|>ROLE<|end_header_id|>\\n\\nTEXT<|eot_id|>...

TEXT is stripped of white space at both ends. In it each `<video>` or `<image>` becomes the block

    <vi_start> V..V <eof> V..V <eof> ... V..V <eov> <vi_end>

of the vision tokens V of each temporal group (the frames that the patchify joins: two, or one where it is
bypassed), `<eof>` between groups and `<eov>` after the last. With `g` groups of `v` tokens it takes
g * v + g + 2 places.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from kangaroo_jax.conventions import UserError
from kangaroo_jax.data.conversation import TAG, Conversation, Media, Turn, count_tags
from kangaroo_jax.data.tokenizer import Tokenizer
from kangaroo_jax.data.video import FramePolicy, MediaInfo, clip_range, probe, sample_times

LOSS_ON = ("assistant", "caption")


@dataclasses.dataclass(frozen=True)
class MediaRef:
    """Frames to decode: those of `path` on display `times` seconds after `start`; an image at time 0."""

    kind: str  # "image" or "video"
    path: str
    times: tuple[float, ...]  # seconds; their number is a multiple of the frames a group
    start: float | None = None  # seconds


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One sample before its pixels.

    tokens int32[n] with the placeholder where a vision token stands; weights float32[n], what each token
    counts as a target (0 or 1); is_vision bool[n]. The vision tokens are, in order, the rows of the groups
    of all media, in order.
    """

    id: str
    tokens: np.ndarray
    weights: np.ndarray
    is_vision: np.ndarray
    media: tuple[MediaRef, ...]
    frames_per_group: int
    tokens_per_group: int

    @property
    def frames(self) -> int:
        """Frames that the media promise."""
        return sum(len(ref.times) for ref in self.media)


def frame_policy(config: ConfigDict, frames_per_group: int) -> FramePolicy:
    """The frame sampling of `config.data`."""
    return FramePolicy(
        fps=config.fps,
        min_frames=config.min_frames,
        max_frames=config.max_frames,
        long_seconds=config.long_seconds,
        long_min_frames=config.long_min_frames,
        long_max_frames=config.long_max_frames,
        multiple=frames_per_group,
    )


def make_recipe(
    conversation: Conversation,
    tokenizer: Tokenizer,
    config: ConfigDict,
    frames_per_group: int,
    tokens_per_group: int,
) -> Recipe:
    """The recipe of a training sample.

    Targets are the assistant's turns and the `<|eot_id|>` that ends each. With `loss_on="caption"` the
    targets are the same, but the user's turns hold their media alone, no text: a caption is learnt
    from what is seen and not from how it was asked for. A sample of more than `max_sample_tokens` (or
    `tokens_per_pack`) tokens loses whole rounds (question and answer) from its end until it fits.

    Args:
        conversation: with at least one assistant's turn.
        tokenizer: ids of text and special tokens.
        config: `config.data`.
        frames_per_group: frames joined by the patchify; the number of frames of each medium is a multiple.
        tokens_per_group: vision tokens that a group becomes.

    Raises:
        UserError: a file cannot be probed, no round fits, or there is no target.
    """
    if config.loss_on not in LOSS_ON:
        raise UserError(f"config.data.loss_on is {config.loss_on!r}: use one of {', '.join(LOSS_ON)}")
    limit = min(config.max_sample_tokens, config.tokens_per_pack)
    ends = [i + 1 for i, turn in enumerate(conversation.turns) if turn.role == "assistant"]
    if not ends:
        raise UserError(f"sample {conversation.id!r}: no assistant's turn to learn from")
    turns = conversation.turns[: ends[-1]]
    if config.loss_on == "caption":
        turns = tuple(_media_only(turn) for turn in turns)
    refs = plan_media(conversation.media, frame_policy(config, frames_per_group), frames_per_group)
    writer = _Writer(tokenizer, refs, frames_per_group, tokens_per_group)
    fitting = None
    for i, turn in enumerate(turns, start=1):
        writer.turn(turn)
        if i in ends:
            frames = sum(len(ref.times) for ref in writer.used)
            if writer.length > limit or frames > config.frames_per_pack:
                if fitting is None:
                    raise UserError(
                        f"sample {conversation.id!r}: {writer.length} tokens and {frames} frames to its first answer, "
                        f"but a sample may have {limit} and {config.frames_per_pack}"
                    )
                break
            fitting = writer.recipe(conversation.id)
    assert fitting is not None
    if not fitting.weights.any():
        raise UserError(f"sample {conversation.id!r}: nothing to learn from in its answers")
    return fitting


def render_prompt(
    conversation: Conversation,
    tokenizer: Tokenizer,
    config: ConfigDict,
    frames_per_group: int,
    tokens_per_group: int,
) -> Recipe:
    """The recipe of a question: all turns, then the header of the answer to come; no targets.

    Earlier rounds (history) are turns of the conversation; its last turn is the user's.

    Raises:
        UserError: a file cannot be probed.
        ValueError: the last turn is not the user's, or tags and media do not match.
    """
    turns = conversation.turns
    if not turns or turns[-1].role != "user":
        raise ValueError(f"conversation {conversation.id!r} must end with the user's turn")
    if count_tags(turns) != [medium.kind for medium in conversation.media]:
        raise ValueError(f"conversation {conversation.id!r}: tags {count_tags(turns)} do not match its media")
    refs = plan_media(conversation.media, frame_policy(config, frames_per_group), frames_per_group)
    writer = _Writer(tokenizer, refs, frames_per_group, tokens_per_group)
    for turn in turns:
        writer.turn(turn)
    writer.header("assistant")
    recipe = writer.recipe(conversation.id)
    return dataclasses.replace(recipe, weights=np.zeros_like(recipe.weights))


def video_block_length(frames: int, frames_per_group: int, tokens_per_group: int) -> int:
    """Tokens that a video of `frames` frames takes, its marks included."""
    groups = -(-frames // frames_per_group)
    return groups * tokens_per_group + groups + 2


def plan_media(media: Sequence[Media], policy: FramePolicy, frames_per_group: int) -> tuple[MediaRef, ...]:
    """Choose the moments to decode; an odd count repeats its last frame, and that frame's time.

    Raises:
        UserError: a video cannot be opened, or has nothing between its start and end.
    """
    refs = []
    for medium in media:
        if medium.kind == "image":
            probe_cached(medium.path)
            times = [0.0]
        else:
            begin, end = clip_range(medium.path, probe_cached(medium.path).seconds, medium.start, medium.end)
            times = sample_times(end - begin, policy.narrowed(medium.fps, medium.max_frames)).tolist()
        times += times[-1:] * (-len(times) % frames_per_group)
        refs.append(MediaRef(medium.kind, medium.path, tuple(times), medium.start))
    return tuple(refs)


def probe_cached(path: str) -> MediaInfo:
    """`probe`, remembered for the last 65,536 files while they stay unchanged. Raises UserError."""
    try:
        status = os.stat(path)
    except OSError:
        return probe(path)  # says what is wrong
    return _probe_version(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=65_536)
def _probe_version(path: str, _modified: int, _size: int) -> MediaInfo:
    return probe(path)


def _media_only(turn: Turn) -> Turn:
    """A user's turn without its words; other turns as they are."""
    if turn.role != "user":
        return turn
    return Turn(turn.role, "".join(match.group() for match in TAG.finditer(turn.text)))


class _Writer:
    """Writes turns as token ids, piece after piece."""

    def __init__(
        self, tokenizer: Tokenizer, refs: Sequence[MediaRef], frames_per_group: int, tokens_per_group: int
    ) -> None:
        self._tokenizer, self._refs = tokenizer, list(refs)
        self._frames_per_group, self._tokens_per_group = frames_per_group, tokens_per_group
        self.used: list[MediaRef] = []
        self._pieces: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []
        self._vision: list[np.ndarray] = []
        self.length = 0
        self._put([tokenizer.bos])

    def _put(self, ids: Sequence[int] | np.ndarray, weight: float = 0.0, vision: np.ndarray | None = None) -> None:
        piece = np.asarray(ids, np.int32)
        self._pieces.append(piece)
        self._weights.append(np.full(len(piece), weight, np.float32))
        self._vision.append(np.zeros(len(piece), bool) if vision is None else vision)
        self.length += len(piece)

    def header(self, role: str) -> None:
        """`<|start_header_id|>ROLE<|end_header_id|>` and two newlines."""
        t = self._tokenizer
        self._put([t.start_header, *t.encode(role), t.end_header, *t.encode("\n\n")])

    def turn(self, turn: Turn) -> None:
        """A whole turn with its header and `<|eot_id|>`."""
        self.header(turn.role)
        weight = float(turn.role == "assistant")
        text = turn.text.strip()
        if turn.role == "assistant":
            self._put(self._tokenizer.encode(text), weight)
        else:
            for i, part in enumerate(TAG.split(text)):  # text, kind of tag, text, kind, ..., text
                if i % 2:
                    self._block(self._refs[len(self.used)])
                elif part:
                    self._put(self._tokenizer.encode(part))
        self._put([self._tokenizer.eot], weight)

    def _block(self, ref: MediaRef) -> None:
        """`<vi_start>`, the groups each followed by `<eof>` (the last by `<eov>`), `<vi_end>`."""
        t = self._tokenizer
        groups = len(ref.times) // self._frames_per_group
        body = np.full((groups, self._tokens_per_group + 1), t.vision, np.int32)
        body[:, -1] = t.eof
        body[-1, -1] = t.eov
        vision = np.ones(body.shape, bool)
        vision[:, -1] = False
        self._put([t.vi_start])
        self._put(body.reshape(-1), vision=vision.reshape(-1))
        self._put([t.vi_end])
        self.used.append(ref)

    def recipe(self, name: str) -> Recipe:
        """What has been written so far."""
        return Recipe(
            id=name,
            tokens=np.concatenate(self._pieces),
            weights=np.concatenate(self._weights),
            is_vision=np.concatenate(self._vision),
            media=tuple(self.used),
            frames_per_group=self._frames_per_group,
            tokens_per_group=self._tokens_per_group,
        )
