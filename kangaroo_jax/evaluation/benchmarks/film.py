"""The frames of films for needles, as files: drawn, or a frame a second of a video."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from kangaroo_jax.corpus.draw import Painter
from kangaroo_jax.corpus.scenes import Scene
from kangaroo_jax.data.media.video import load_video, probe_cached
from kangaroo_jax.system.files import write_bytes

FILM = 160  # frames of a film that are drawn or taken; longer ones begin again


def frames_of_film(film: Path | None, target: Path) -> list[str]:
    """The frames of a film, written once: drawn, a frame a second of a file, or of one scene that drifts."""
    if film is None:
        painter = Painter(Scene("long", FILM, (), 20, 1, drift=(10.0, 12.0, 84.0, 80.0)))
        pictures = [painter.frame(second) for second in range(FILM)]
    else:
        seconds = min(int(probe_cached(str(film), "video").seconds), FILM)
        pictures = list(load_video(film, image_size=448, times=[float(s) for s in range(max(seconds, 1))]).pixels)
    name = film.stem if film else "drawn"
    return [written(target / f"{name}-{number}.png", picture) for number, picture in enumerate(pictures)]


def written(path: Path, picture: np.ndarray) -> str:
    """The path of a picture uint8[height, width, 3], which is written where it is not there."""
    if not path.exists():
        file = io.BytesIO()
        Image.fromarray(picture).save(file, format="PNG")
        write_bytes(path, file.getvalue())
    return str(path)
