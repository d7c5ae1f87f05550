"""From a conversation to a recipe: token ids, loss weights and which moments of which files to decode.

A recipe holds no pixels, so that recipes are cheap to pack, reorder and discard.

The text is written as the tokenizer's chat format says (`data.chat_format`). Llama 3's has no system prompt unless the
conversation has one:

    <|begin_of_text|><|start_header_id|>ROLE<|end_header_id|>\\n\\nTEXT<|eot_id|>...

TEXT is stripped of white space at both ends. In it each `<video>` or `<image>` becomes the block

    <vi_start> V..V <eof> V..V <eof> ... V..V <eov> <vi_end>

of the vision tokens V of each temporal group (the frames that the patchify joins: two, or one where it is
bypassed), `<eof>` between groups and `<eov>` after the last. With `g` groups of `v` tokens it takes
g * v + g + 2 positions.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kangaroo_jax.config import DataConfig
from kangaroo_jax.data.annotations.conversation import TAG, Conversation, Media, Turn, count_tags, language_of, literal
from kangaroo_jax.data.chat_format import Item
from kangaroo_jax.data.media.addresses import short
from kangaroo_jax.data.media.video import (
    FramePolicy,
    MediaInfo,
    MediaRef,
    clip_range,
    folder_of_frames,
    probe_cached,
    sample_times,
)
from kangaroo_jax.data.tokenizer import Tokenizer, whole_characters
from kangaroo_jax.errors import UserError

LOSS_ON = ("assistant", "caption")
Prober = Callable[[str, str], MediaInfo]  # (path, kind)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One sample without its pixels.

    tokens int32[n] with the placeholder where a vision token stands; weights float32[n], what each token
    counts as a target (0 for none); is_vision bool[n]. The vision tokens are, in order, the rows of the groups
    of all media, in order.
    """

    id: str
    tokens: np.ndarray
    weights: np.ndarray
    is_vision: np.ndarray
    media: tuple[MediaRef, ...]
    frames_per_group: int
    tokens_per_group: int
    language: str = ""

    @property
    def frames(self) -> int:
        """The number of frames to decode for all media."""
        return sum(len(ref.times) for ref in self.media)


def frame_policy(config: DataConfig, frames_per_group: int) -> FramePolicy:
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
    config: DataConfig,
    frames_per_group: int,
    tokens_per_group: int,
    probe_media: Prober | None = None,
) -> Recipe:
    """The recipe of a training sample.

    Targets are the assistant's turns and the tokens that end each (`<|eot_id|>`), which also end the sample. With
    `loss_on="caption"` the targets are the same, but the user's turns hold only their media, no text: the caption does
    not depend on how it was asked for. A sample of more than `max_sample_tokens` (or `tokens_per_pack`) tokens loses
    whole rounds (question and answer) from its end until it fits.

    Args:
        conversation: with at least one assistant's turn.
        tokenizer: ids of text and special tokens.
        config: `config.data`.
        frames_per_group: frames joined by the patchify; the number of frames of each medium is a multiple.
        tokens_per_group: vision tokens that a group becomes.
        probe_media: returns a medium's length; by default `probe_cached`.

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
    policy = frame_policy(config, frames_per_group)
    refs = plan_media(conversation.media, policy, frames_per_group, probe_media or probe_cached)
    writer = _Writer(tokenizer, frames_per_group, tokens_per_group)
    budget, fitting = config.frames_per_pack, None
    for _ in writer.rounds(_in_parts(turns, refs)):
        frames = sum(len(ref.times) for ref in writer.used)
        if writer.length > limit or frames > budget:
            if fitting is None:
                asked = [f"{medium.fps:g}" for medium in conversation.media if medium.fps is not None]
                why = f"; its 'fps' asks for {', '.join(asked)} frames a second of video" if asked else ""
                raise UserError(
                    f"sample {conversation.id!r}: {writer.length} tokens and {frames} frames to its first answer, "
                    f"but a sample may have {limit} and {budget}{why}"
                )
            break
        fitting = writer.mark()
    assert fitting is not None
    recipe = writer.recipe(conversation.id, fitting, language_of(conversation))
    if not recipe.weights.any():
        raise UserError(f"sample {conversation.id!r}: nothing to learn from in its answers")
    return recipe


def render_prompt(
    conversation: Conversation,
    tokenizer: Tokenizer,
    config: DataConfig,
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
    writer = _Writer(tokenizer, frames_per_group, tokens_per_group)
    writer.write(_in_parts(turns, refs), ask=True)
    recipe = writer.recipe(conversation.id)
    return dataclasses.replace(recipe, weights=np.zeros_like(recipe.weights))


def render_parts(
    turns: Sequence[tuple[str, Sequence[str | MediaRef]]],
    tokenizer: Tokenizer,
    frames_per_group: int,
    tokens_per_group: int,
    *,
    ask: bool = True,
    leave_open: bool = False,
) -> Recipe:
    """The recipe of a question whose turns are given in parts, so that no text of them is read as a tag.

    Args:
        turns: (role, parts in their order) of each; a newline stands between two parts that have no white space there.
        tokenizer: ids of text and special tokens.
        frames_per_group: frames joined by the patchify; the number of frames of each medium is a multiple.
        tokens_per_group: vision tokens that a group becomes.
        ask: whether the header of the answer to come follows.
        leave_open: whether the last turn goes on with the answer: nothing ends it, and no header follows.
    """
    writer = _Writer(tokenizer, frames_per_group, tokens_per_group)
    writer.write([_Said(role, _joined(parts)) for role, parts in turns], ask=ask, leave_open=leave_open)
    recipe = writer.recipe("")
    return dataclasses.replace(recipe, weights=np.zeros_like(recipe.weights))


def _joined(parts: Sequence[str | MediaRef]) -> list[str | MediaRef]:
    """Parts with newlines between them, neighbouring texts in one, and without white space at both ends."""
    joined: list[str | MediaRef] = []
    for part in parts:
        before = joined[-1] if joined else "\n"
        for piece in ("" if _ends_in_space(before) or _begins_with_space(part) or not part else "\n", part):
            if isinstance(piece, str) and joined and isinstance(joined[-1], str):
                joined[-1] += piece
            elif piece:
                joined.append(piece)
    if joined and isinstance(joined[0], str):
        joined[0] = joined[0].lstrip()
    if joined and isinstance(joined[-1], str):
        joined[-1] = joined[-1].rstrip()
    return [part for part in joined if part]


def _ends_in_space(part: str | MediaRef) -> bool:
    return isinstance(part, str) and part[-1:].isspace()


def _begins_with_space(part: str | MediaRef) -> bool:
    return isinstance(part, str) and part[:1].isspace()


def video_block_length(frames: int, frames_per_group: int, tokens_per_group: int) -> int:
    """Tokens that a video of `frames` frames takes, including its marker tokens."""
    groups = -(-frames // frames_per_group)
    return groups * tokens_per_group + groups + 2


def plan_media(
    media: Sequence[Media], policy: FramePolicy, frames_per_group: int, probe_media: Prober | None = None
) -> tuple[MediaRef, ...]:
    """Choose the moments to decode; an odd count repeats its last frame, and that frame's time.

    A video given as images takes all of them, or as many as the policy allows, evenly spaced. A video whose record
    states its duration is not opened.

    Raises:
        UserError: a video cannot be opened, or has nothing between its start and end.
    """
    probe_media = probe_media or probe_cached
    refs = []
    for medium in media:
        frames: tuple[str, ...] = ()
        if medium.kind == "image":
            probe_media(medium.path, medium.kind)
            times = [0.0]
        elif medium.frames or os.path.isdir(medium.path):
            frames, times = _plan_frames(medium, policy)
        else:
            seconds = annotated_seconds(medium) or probe_media(medium.path, medium.kind).seconds
            begin, end = clip_range(medium.path, seconds, medium.start, medium.end)
            wanted = policy.narrowed(medium.fps, medium.max_frames, medium.min_frames, medium.nframes)
            times = sample_times(end - begin, wanted).tolist()
        missing = -len(times) % frames_per_group
        times += times[-1:] * missing
        refs.append(MediaRef(medium.kind, medium.path, tuple(times), medium.start, frames + frames[-1:] * missing))
    return tuple(refs)


def annotated_seconds(medium: Media) -> float | None:
    """A video's duration as its record states it; None if it states none, or the clip lies beyond it."""
    inside = medium.duration is not None and max(medium.start or 0.0, medium.end or 0.0) <= medium.duration
    return medium.duration if inside else None


def _plan_frames(medium: Media, policy: FramePolicy) -> tuple[tuple[str, ...], list[float]]:
    """The images of a video to take, and the time of each, in seconds from `start`."""
    frames = medium.frames or folder_of_frames(medium.path)
    rate = medium.sample_fps or policy.fps
    begin, end = clip_range(medium.path, len(frames) / rate, medium.start, medium.end)
    if medium.times:
        return _plan_timed(medium, policy)
    inside = range(math.ceil(begin * rate - 1e-9), min(len(frames), max(math.ceil(end * rate - 1e-9), 1)))
    is_long = end - begin > policy.long_seconds
    policy = policy.narrowed(None, medium.max_frames, medium.min_frames, medium.nframes)
    most = policy.long_max_frames if is_long else policy.max_frames
    chosen = list(inside)
    if len(chosen) > most:
        chosen = [inside[int((i + 0.5) * len(inside) / most)] for i in range(most)]
    if not chosen:
        raise UserError(f"{short(medium.path)}: no frame between start {begin:g} s and end {end:g} s")
    return tuple(frames[i] for i in chosen), [i / rate - begin for i in chosen]


def _plan_timed(medium: Media, policy: FramePolicy) -> tuple[tuple[str, ...], list[float]]:
    """`_plan_frames` of images that come with their seconds."""
    chosen = list(zip(medium.frames, medium.times, strict=True))
    most = policy.long_max_frames if medium.times[-1] > policy.long_seconds else policy.max_frames
    if len(chosen) > most:
        chosen = [chosen[int((i + 0.5) * len(chosen) / most)] for i in range(most)]
    return tuple(path for path, _ in chosen), [time for _, time in chosen]


def _media_only(turn: Turn) -> Turn:
    """A user's turn without its words; other turns as they are."""
    if turn.role != "user":
        return turn
    return Turn(turn.role, "".join(match.group() for match in TAG.finditer(turn.text)))


@dataclasses.dataclass(frozen=True)
class _Said:
    """A turn: its texts, none of which is a tag, and media; `loss` is the weight of its tokens, 0 for none."""

    role: str
    parts: Sequence[str | MediaRef]
    loss: float = 0.0


def _in_parts(turns: Sequence[Turn], refs: Sequence[MediaRef]) -> list[_Said]:
    """Turns, in which tags stand for the media in their order, as texts and media."""
    left = iter(refs)
    said = []
    for turn in turns:
        text = turn.text.strip()
        if turn.role == "assistant" or "<" not in text:
            said.append(_Said(turn.role, [text], turn.loss if turn.role == "assistant" else 0.0))
            continue
        pieces = enumerate(TAG.split(text))  # text, kind of tag, text, kind, ..., text
        said.append(
            _Said(turn.role, [next(left) if i % 2 else literal(piece) for i, piece in pieces if i % 2 or piece])
        )
    return said


class _Writer:
    """Writes turns as token ids; spans of them are vision tokens or count in the loss."""

    def __init__(self, tokenizer: Tokenizer, frames_per_group: int, tokens_per_group: int) -> None:
        self._tokenizer, self._format = tokenizer, tokenizer.format
        self._frames_per_group, self._tokens_per_group = frames_per_group, tokens_per_group
        self.used: list[MediaRef] = []
        self._ids: list[int] = []
        self._learnt: list[tuple[int, int, float]] = []  # begin, end, weight
        self._blocks: list[tuple[int, int]] = []  # begin, groups
        self._texts: list[tuple[str, float]] = []  # of neighbouring texts that are encoded as one, weights

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self._ids)

    def write(self, turns: Sequence[_Said], *, ask: bool = False, leave_open: bool = False) -> None:
        """Whole turns, and the header of an answer to come; `leave_open` leaves out what ends the last turn."""
        for _ in self.rounds(turns, ask=ask, leave_open=leave_open):
            pass

    def rounds(self, turns: Sequence[_Said], *, ask: bool = False, leave_open: bool = False) -> Iterator[None]:
        """`write`, with a pause after each assistant's turn and what ends it."""
        first, *frames = self._format.frames(tuple(turn.role for turn in turns), ask, leave_open)
        self._items(first.items)
        for turn, frame in zip(turns, frames, strict=True):
            for part in turn.parts:
                if isinstance(part, str):
                    self._text(part, turn.loss)
                else:
                    self._block(part)
            self._items(frame.items[: frame.end], turn.loss)
            if turn.role == "assistant" and frame.end:
                yield
            self._items(frame.items[frame.end :])
        self._flush()

    def _items(self, items: Sequence[Item], loss: float = 0.0) -> None:
        """What stands around contents."""
        for item in items:
            if isinstance(item, str):
                self._text(item, loss)
                continue
            self._flush()
            if loss:
                self._learnt.append((len(self._ids), len(self._ids) + 1, loss))
            self._ids.append(item)

    def _text(self, text: str, loss: float) -> None:
        """A text, by itself or, as the format says, as one with its neighbours."""
        if self._format.joins:
            self._texts.append((whole_characters(text), loss))
            return
        begin = len(self._ids)
        self._ids += self._tokenizer.encode(text)
        if loss:
            self._learnt.append((begin, len(self._ids), loss))

    def _flush(self) -> None:
        """Encode the texts that wait. A token that has a character of a text counts as much as that text."""
        if not self._texts:
            return
        assert self._tokenizer.spans is not None
        ids, places = self._tokenizer.spans("".join(text for text, _ in self._texts))
        begin = end = 0
        for text, loss in self._texts:
            begin, end = end, end + len(text)
            if loss and text:
                first = next((i for i, (_, last) in enumerate(places) if last > begin), len(ids))
                after = next((i for i in range(first, len(ids)) if places[i][0] >= end), len(ids))
                self._learnt.append((len(self._ids) + first, len(self._ids) + after, loss))
        self._ids += ids
        self._texts = []

    def _block(self, ref: MediaRef) -> None:
        """`<vi_start>`, the groups each followed by `<eof>` (the last by `<eov>`), `<vi_end>`."""
        self._flush()
        t = self._tokenizer
        groups = len(ref.times) // self._frames_per_group
        self._ids.append(t.vi_start)
        self._blocks.append((len(self._ids), groups))
        self._ids += ([t.vision] * self._tokens_per_group + [t.eof]) * groups
        self._ids[-1] = t.eov
        self._ids.append(t.vi_end)
        self.used.append(ref)

    def mark(self) -> tuple[int, int]:
        """The current end, in tokens and media."""
        return len(self._ids), len(self.used)

    def recipe(self, name: str, mark: tuple[int, int] | None = None, language: str = "") -> Recipe:
        """What has been written so far, or up to a mark."""
        length, media = mark or self.mark()
        weights, is_vision = np.zeros(length, np.float32), np.zeros(length, bool)
        for begin, end, weight in self._learnt:
            weights[begin:end] = weight
        for begin, groups in self._blocks[:media]:
            block = is_vision[begin : begin + groups * (self._tokens_per_group + 1)]
            block.reshape(groups, -1)[:, :-1] = True
        return Recipe(
            id=name,
            tokens=np.array(self._ids[:length], np.int32),
            weights=weights,
            is_vision=is_vision,
            media=tuple(self.used[:media]),
            frames_per_group=self._frames_per_group,
            tokens_per_group=self._tokens_per_group,
            language=language,
        )
