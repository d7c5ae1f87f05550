"""Media that are given as they lie in memory, bytes, arrays and PIL's images, as files that can be read like others."""

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kangaroo_jax.data.media.image import to_rgb
from kangaroo_jax.errors import UserError


class Spool:
    """A folder of what was given, each thing once, named by its content; it is removed with this object."""

    def __init__(self) -> None:
        self._folder: str | None = None

    def path(self, thing: Any) -> Any:
        """What names a medium: a path as it is, a list of frames as a list of paths, anything else as a new file.

        Bytes are those of a file. An array is an image uint8[height, width, 3] or, with one more dimension, the frames
        of a video. Raises UserError for what is none of these.
        """
        if isinstance(thing, str | os.PathLike):
            return os.fspath(thing)
        if isinstance(thing, bytes | bytearray | memoryview):
            return self._written(bytes(thing))
        if isinstance(thing, Image.Image):
            return self._image(thing)
        if isinstance(thing, np.ndarray):
            if thing.dtype == np.uint8 and thing.ndim in (3, 4) and thing.shape[-1] == 3 and thing.size:
                return self._pixels(thing) if thing.ndim == 3 else [self._pixels(frame) for frame in thing]
            raise UserError(f"an array of {thing.dtype} {thing.shape}: pixels are uint8[height, width, 3]")
        if isinstance(thing, Sequence):
            return [self.path(frame) for frame in thing]
        raise UserError(f"a medium cannot be given as {type(thing).__name__}: give a path, bytes, an array or an image")

    def _image(self, image: Image.Image) -> str:
        exif = image.getexif()
        exif = Image.Exif() if 0x0112 not in exif else exif
        turn = exif.get(0x0112)
        return self._pixels(np.asarray(to_rgb(image)), turn)

    def _pixels(self, pixels: np.ndarray, turn: int | None = None) -> str:
        name = hashlib.sha256(repr((pixels.shape, turn)).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()
        path = self._place(f"{name}.png")
        if not path.exists():
            exif = Image.Exif()
            if turn:
                exif[0x0112] = turn
            aside = path.with_suffix(".part")
            Image.fromarray(pixels).save(aside, "PNG", compress_level=1, exif=exif)
            aside.replace(path)
        return str(path)

    def _written(self, data: bytes) -> str:
        path = self._place(hashlib.sha256(data).hexdigest())
        if not path.exists():
            aside = path.with_suffix(".part")
            aside.write_bytes(data)
            aside.replace(path)
        return str(path)

    def _place(self, name: str) -> Path:
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="kangaroo-given-")
            self._end = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return Path(self._folder) / name

    def close(self) -> None:
        """Remove the folder."""
        if self._folder is not None:
            self._end()
            self._folder = None
