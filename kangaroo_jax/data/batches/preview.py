"""Looking at a batch before training on it: as a tree of arrays, and as a picture."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kangaroo_jax.conventions import FIELDS, PackedBatch
from kangaroo_jax.data.tokenizer import Tokenizer

_WIDTH, _MARGIN, _THUMB, _LINE = 1280, 16, 72, 19  # pixels
_MAX_LINES = 14  # lines of text for a row of the batch
_INK, _GREY, _TRAINED, _SPECIAL = "#222222", "#8a8a8a", "#c6efce", "#2f5fb3"
_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#76b7b2", "#e15759", "#edc948", "#9c755f")
# Fonts with Chinese, Japanese and Korean, as systems name them; Pillow looks through the system's folders.
_CJK_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "PingFang.ttc",
    "msyh.ttc",
)
_NO_CHARACTER = "\U0010fffe"  # Unicode gives it no meaning: a font draws what it has for characters that it lacks


def batch_tree(batch: PackedBatch) -> str:
    """A line for each array (name, type, shape, range), and one that says how full the batch is."""
    lines = ["PackedBatch"]
    for name in FIELDS:
        array = np.asarray(getattr(batch, name))
        span = f"{array.min():g} .. {array.max():g}" if array.size else "empty"
        shape = ", ".join(map(str, array.shape))
        letters = FIELDS[name].letters.replace(" ", ", ")
        lines.append(f"  {name:<13}{array.dtype!s:<8} [{letters}] = [{shape}]  {span}")
    used, frames = np.asarray(batch.segment_ids) > 0, np.asarray(batch.frame_groups) > 0
    samples = sum(len(np.unique(row[row > 0])) for row in np.asarray(batch.segment_ids))
    lines.append(
        f"  {samples} samples in {len(used)} rows; in use: {used.sum():,} of {used.size:,} tokens"
        f" ({_share(used)}), {frames.sum():,} of {frames.size:,} frames ({_share(frames)});"
        f" {int((np.asarray(batch.weights) > 0).sum()):,} tokens are learnt"
    )
    return "\n".join(lines)


def save_picture(batch: PackedBatch, tokenizer: Tokenizer, path: str | Path, *, max_rows: int = 4) -> Path:
    """Draw the first rows of a batch to a PNG file: a map of the segments, frames with times, and the text.

    In the map and the text, tokens that count in the loss have a green background. Characters that no font of this
    machine has are written as `\\uXXXX`.
    """
    rows = min(max_rows, len(batch.tokens))
    font, small = _font(14), _font(11)
    canvas = Image.new("RGB", (_WIDTH, 80 + rows * (_THUMB * 4 + _LINE * (_MAX_LINES + 8))), "white")
    pen = _Pen(ImageDraw.Draw(canvas), canvas, font, small, _MARGIN)
    pen.line("One batch: segments (colours), vision tokens (pale), what is learnt (green), frames and their seconds")
    for b in range(rows):
        _draw_row(pen, _Row.of(batch, b), tokenizer)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.crop((0, 0, _WIDTH, min(canvas.height, pen.y + _MARGIN))).save(path)
    return path


def _share(mask: np.ndarray) -> str:
    return f"{100 * mask.mean():.0f}%" if mask.size else "none"


@dataclasses.dataclass(frozen=True)
class _Row:
    """One row of a batch, the tokens of it that are learnt, and the segment of each frame."""

    index: int
    tokens: np.ndarray
    segments: np.ndarray
    learnt: np.ndarray
    vision: np.ndarray
    frames: np.ndarray
    times: np.ndarray
    groups: np.ndarray
    frame_segments: np.ndarray

    @staticmethod
    def of(batch: PackedBatch, b: int) -> "_Row":
        segments, vision = np.asarray(batch.segment_ids)[b], np.asarray(batch.vision_index)[b]
        groups = np.asarray(batch.frame_groups)[b]
        learnt = np.concatenate([[False], np.asarray(batch.weights)[b, :-1] > 0])
        frame_segments = np.zeros(len(groups), np.int64)
        is_vision = vision >= 0
        if is_vision.any():
            tokens_per_group = int(is_vision.sum()) // len(np.unique(groups[groups > 0]))
            of_group = dict(zip(vision[is_vision] // tokens_per_group + 1, segments[is_vision], strict=True))
            frame_segments = np.array([of_group.get(group, 0) for group in groups])
        return _Row(
            index=b,
            tokens=np.asarray(batch.tokens)[b],
            segments=segments,
            learnt=learnt,
            vision=is_vision,
            frames=np.asarray(batch.frames)[b],
            times=np.asarray(batch.frame_times)[b],
            groups=groups,
            frame_segments=frame_segments,
        )


class _Pen:
    """A position on the canvas, moving down."""

    def __init__(self, draw: ImageDraw.ImageDraw, canvas: Image.Image, font: "_Font", small: "_Font", y: int) -> None:
        self.draw, self.canvas, self.font, self.small, self.y = draw, canvas, font, small, y

    def line(self, text: str, colour: str = _INK) -> None:
        self.draw.text((_MARGIN, self.y), self.font.shown(text), fill=colour, font=self.font.face)
        self.y += _LINE + 3


def _draw_row(pen: _Pen, row: _Row, tokenizer: Tokenizer) -> None:
    pen.y += 8
    samples = len(np.unique(row.segments[row.segments > 0]))
    pen.line(
        f"row {row.index}: {samples} samples, {(row.segments > 0).sum()} of {len(row.segments)} tokens, "
        f"{(row.groups > 0).sum()} of {len(row.groups)} frames, {row.learnt.sum()} tokens learnt"
    )
    _draw_map(pen, row)
    _draw_frames(pen, row)
    _draw_text(pen, row, tokenizer)


def _draw_map(pen: _Pen, row: _Row) -> None:
    """The row's tokens from left to right; learnt ones in a green strip below."""
    colours = np.full((len(row.tokens), 3), 235, np.float32)
    for segment in np.unique(row.segments[row.segments > 0]):
        colours[row.segments == segment] = _rgb(_colour(segment))
    colours[row.vision] = 255 - (255 - colours[row.vision]) * 0.45
    strip = np.where(row.learnt[:, None], np.array(_rgb("#2e9e4f")), 250)
    image = np.concatenate([np.repeat(colours[None], 20, 0), np.repeat(strip[None], 6, 0)]).astype(np.uint8)
    bar = Image.fromarray(image).resize((_WIDTH - 2 * _MARGIN, 26), Image.Resampling.NEAREST)
    pen.canvas.paste(bar, (_MARGIN, pen.y))
    pen.y += 34


def _draw_frames(pen: _Pen, row: _Row, max_lines: int = 3) -> None:
    """Thumbnails framed in their segment's colour, with seconds; an even selection if there are too many."""
    indices = np.flatnonzero(row.groups > 0)
    if not len(indices):
        return
    a_line = (_WIDTH - 2 * _MARGIN) // (_THUMB + 6)
    if len(indices) > a_line * max_lines:
        indices = indices[np.linspace(0, len(indices) - 1, a_line * max_lines).round().astype(int)]
    for i, frame in enumerate(indices):
        x = _MARGIN + (i % a_line) * (_THUMB + 6)
        y = pen.y + (i // a_line) * (_THUMB + 22)
        thumb = Image.fromarray(row.frames[frame]).resize((_THUMB, _THUMB), Image.Resampling.NEAREST)
        pen.canvas.paste(thumb, (x, y))
        pen.draw.rectangle(
            (x - 2, y - 2, x + _THUMB + 1, y + _THUMB + 1), outline=_colour(row.frame_segments[frame]), width=2
        )
        pen.draw.text((x, y + _THUMB + 2), f"{row.times[frame]:.2f} s", fill=_GREY, font=pen.small.face)
    pen.y += (1 + (len(indices) - 1) // a_line) * (_THUMB + 22) + 4


def _draw_text(pen: _Pen, row: _Row, tokenizer: Tokenizer) -> None:
    """The decoded text of each segment, wrapped; special tokens in blue, learnt pieces on green."""
    lines, x, before = 1, float(_MARGIN), 0
    for segment, text, special, learnt in _pieces(row, tokenizer):
        if segment != before:
            if before:
                pen.y += _LINE
                lines, x = lines + 1, _MARGIN
            pen.draw.rectangle((_MARGIN, pen.y + 3, _MARGIN + 10, pen.y + 13), fill=_colour(segment))
            x, before = _MARGIN + 18, segment
        for char in pen.font.shown(text.replace("\n", "\\n")):
            width = pen.draw.textlength(char, font=pen.font.face)
            if x + width > _WIDTH - _MARGIN:
                pen.y += _LINE
                lines, x = lines + 1, _MARGIN + 18
            if lines > _MAX_LINES:
                pen.line("...", _GREY)
                return
            if learnt:
                pen.draw.rectangle((x, pen.y, x + width, pen.y + _LINE - 2), fill=_TRAINED)
            pen.draw.text((x, pen.y), char, fill=_SPECIAL if special else _INK, font=pen.font.face)
            x += width
    pen.y += _LINE + 6


def _pieces(row: _Row, tokenizer: Tokenizer) -> Iterator[tuple[int, str, bool, bool]]:
    """Runs of tokens of one sort: segment, text, whether special, whether learnt. Vision tokens become a count."""
    i, n = 0, len(row.tokens)
    while i < n:
        if row.segments[i] == 0:
            i += 1
            continue
        special = tokenizer.name(row.tokens[i]) is not None
        sort = (row.segments[i], row.vision[i], row.learnt[i])
        j = i + 1
        while j < n and sort == (row.segments[j], row.vision[j], row.learnt[j]):
            if not row.vision[i] and (special or tokenizer.name(row.tokens[j]) is not None):
                break
            j += 1
        if row.vision[i]:
            text = f"[{j - i} V]"
        elif special:
            text = str(tokenizer.name(row.tokens[i]))
        else:
            text = tokenizer.decode(row.tokens[i:j])
        yield int(row.segments[i]), text, special or bool(row.vision[i]), bool(row.learnt[i])
        i = j


@dataclasses.dataclass(frozen=True)
class _Font:
    """A font that knows what it cannot show."""

    face: ImageFont.FreeTypeFont | ImageFont.ImageFont

    def shown(self, text: str) -> str:
        """`text` with what the font cannot show written as escapes."""
        return "".join(c if _shows(self.face, c) else c.encode("unicode_escape").decode() for c in text)


@functools.cache
def _shows(face: ImageFont.FreeTypeFont | ImageFont.ImageFont, char: str) -> bool:
    if char.isascii() or not isinstance(face, ImageFont.FreeTypeFont):
        return char.isascii() and char.isprintable()
    drawn, missing = (face.getmask(one) for one in (char, _NO_CHARACTER))
    return char.isprintable() and (drawn.size, bytes(drawn)) != (missing.size, bytes(missing))


def _font(size: int) -> _Font:
    for name in _CJK_FONTS:
        try:
            return _Font(ImageFont.truetype(name, size))
        except OSError:
            continue
    return _Font(ImageFont.load_default(size))


def _colour(segment: int) -> str:
    return _COLOURS[(segment - 1) % len(_COLOURS)] if segment else "#cccccc"


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
