"""Writing H.264: what this project draws itself."""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np


def write_h264(path: Path, pictures: Iterable[np.ndarray], fps: int, options: Mapping[str, str] | None = None) -> Path:
    """Write pictures, uint8[height, width, 3] (RGB) with even sides, as H.264 at `fps` frames a second; returns `path`.

    The container is that of the file's name; `options` are libx264's. The same pictures give the same bytes.
    """
    import av

    pictures = iter(pictures)
    first = next(pictures)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=dict(options or {}))
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # of several, the bytes differ
        for picture in itertools.chain([first], pictures):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path
