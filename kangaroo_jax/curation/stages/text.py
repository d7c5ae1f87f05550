"""Text coverage: the share of the picture under text, mean of the key frames.

PP-OCR (PaddleOCR's models, as ONNX files in the package rapidocr) finds boxes in a small picture. The detector alone
finds text in plain walls and in hands that hold cups. So where the boxes cover more than a little, they are read, and
only those with letters or digits above some score count. Overlapping boxes count once.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from kangaroo_jax.curation.stages.base import Outcome, Row, Settings, rounded
from kangaroo_jax.curation.stages.pictures import key_frames

_LOOK = (96, 16)  # width and height in pixels at which lines are compared
_ALIKE = 0.9  # correlation above which two lines are the same
_FAINT = 4.0  # grey levels of contrast; a fainter line matches no other
_SAME = 0.8  # intersection over union above which a box has not moved


def text(row: Row, settings: Settings, root: Path) -> Outcome:
    """`coverage`, `frames` (each), `detected` (before reading), `static_share` (of the text's area: at the same place
    in another key frame, as logos and captions are), `sample` (what was read first).
    """
    pictures = key_frames(row, root)
    reader = _reader(settings["side"])
    boxes = [_boxes(reader, picture) for picture in pictures]
    detected = [coverage(found, picture.shape) for found, picture in zip(boxes, pictures, strict=True)]
    words: list[str] = []
    if verified := np.mean(detected) > settings["verify_above"]:
        lines = _Lines(reader)
        for k, picture in enumerate(pictures):
            boxes[k], read = _read(lines, picture, boxes[k], settings)
            words += read
    frames = [coverage(found, picture.shape) for found, picture in zip(boxes, pictures, strict=True)]
    scores = {
        "coverage": rounded(np.mean(frames)),
        "frames": [rounded(x) for x in frames],
        "detected": rounded(np.mean(detected)),
        "verified": bool(verified),
        "static_share": rounded(static_share(boxes)),
        "sample": " ".join(words)[:120],
    }
    return Outcome(scores)


@functools.cache
def _reader(side: int) -> Any:
    """The models, loaded once in a process."""
    from rapidocr import RapidOCR

    params = {
        "Global.log_level": "error",
        "Global.use_cls": False,
        "Det.limit_side_len": side,
        "Det.limit_type": "max",
        "Rec.rec_batch_num": 1,  # more takes more memory and no less time on one core
        "EngineConfig.onnxruntime.intra_op_num_threads": 1,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
    return RapidOCR(params=params)


def _boxes(reader: Any, picture: np.ndarray) -> list[np.ndarray]:
    found = reader(picture, use_det=True, use_cls=False, use_rec=False).boxes
    return [] if found is None else [np.asarray(box, np.float32) for box in found]


class _Lines:
    """Reads lines of text. A line that looks like an earlier one of the clip, such as a caption, is not read again."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self._looks = np.zeros((0, _LOOK[0] * _LOOK[1]), np.float32)
        self._found: list[tuple[str, float]] = []

    def __call__(self, line: np.ndarray) -> tuple[str, float]:
        """The text of uint8[height, width, 3] and its score."""
        look = cv2.cvtColor(cv2.resize(line, _LOOK, interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2GRAY)
        flat = look.ravel().astype(np.float32) - look.mean()
        flat /= max(float(np.linalg.norm(flat)), _FAINT * flat.size**0.5)
        alike = self._looks @ flat
        if alike.size and alike.max() > _ALIKE:
            return self._found[int(alike.argmax())]
        found = self._reader(line, use_det=False, use_cls=False, use_rec=True)
        self._found.append((found.txts[0], found.scores[0]) if found.txts else ("", 0.0))
        self._looks = np.concatenate([self._looks, flat[None]])
        return self._found[-1]


def _read(
    lines: _Lines, picture: np.ndarray, boxes: Sequence[np.ndarray], settings: Settings
) -> tuple[list[np.ndarray], list[str]]:
    """The boxes in which text is read, and the text."""
    kept, words = [], []
    for box in boxes:
        line, score = lines(_upright(picture, box))
        if score >= settings["min_score"] and sum(letter.isalnum() for letter in line) >= settings["min_letters"]:
            kept.append(box)
            words.append(line)
    return kept, words


def _upright(picture: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The contents of a box, float32[4, 2] (clockwise from the upper left corner), as a level line of text."""
    width, height = (max(1, int(max(np.linalg.norm(a), np.linalg.norm(b)))) for a, b in _sides(box))
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    turn = cv2.getPerspectiveTransform(box, corners)
    line = cv2.warpPerspective(picture, turn, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return np.ascontiguousarray(np.rot90(line)) if height >= 1.5 * width else line


def _sides(box: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The vectors of the upper and lower side, and of the left and right side."""
    return (box[1] - box[0], box[2] - box[3]), (box[3] - box[0], box[2] - box[1])


def coverage(boxes: Sequence[np.ndarray], shape: tuple[int, ...]) -> float:
    """Share of a picture [height, width, ...] under the union of boxes, float32[4, 2] each (x, y)."""
    return float(_mask(boxes, shape).mean()) if boxes else 0.0


def _mask(boxes: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape[:2], np.uint8)
    for box in boxes:  # one at a time: OpenCV leaves a hole where two polygons of one call overlap
        cv2.fillPoly(mask, [np.round(box).astype(np.int32)], 1)
    return mask


def static_share(boxes: Sequence[Sequence[np.ndarray]]) -> float:
    """The share of the boxes' area that is at nearly the same place in another frame; 0 without boxes."""
    total = still = 0.0
    for k, found in enumerate(boxes):
        others = [other for j, more in enumerate(boxes) if j != k for other in more]
        for box in found:
            area = _area(_bounds(box))
            total += area
            still += area * any(_overlap(box, other) > _SAME for other in others)
    return still / total if total else 0.0


def _bounds(box: np.ndarray) -> tuple[float, float, float, float]:
    (left, top), (right, bottom) = box.min(0), box.max(0)
    return float(left), float(top), float(right), float(bottom)


def _area(bounds: tuple[float, float, float, float]) -> float:
    return max(0.0, bounds[2] - bounds[0]) * max(0.0, bounds[3] - bounds[1])


def _overlap(one: np.ndarray, two: np.ndarray) -> float:
    """Intersection over union of the boxes' bounds."""
    a, b = _bounds(one), _bounds(two)
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return shared / max(_area(a) + _area(b) - shared, 1e-9)
