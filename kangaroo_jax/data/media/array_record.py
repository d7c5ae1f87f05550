"""Records of a built dataset (`data.annotations.dataset`): their features, and the media in them."""

import functools
from typing import Any

import numpy as np

from kangaroo_jax.data.media.storage import MEMBER
from kangaroo_jax.errors import UserError, one_line
from kangaroo_jax.system.installing import install_line


def features() -> Any:
    """The `tfds.features` of a record. Raises UserError where tensorflow_datasets is not installed."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError(f"tensorflow-datasets is missing (TensorFlow is not needed): {install_line('data')}") from None
    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {
            "id": text(),
            "language": text(),
            "turns": tfds.features.Sequence(
                {"role": text(), "text": text(), "loss": tfds.features.Scalar(dtype=np.float32)}
            ),
            "media": tfds.features.Sequence(
                {
                    "kind": text(),
                    "path": text(),  # where it was read from; its ending tells the kind of file
                    "options": text(),  # JSON: start, end, fps, ...
                    "frames": text(),  # JSON: paths of a video given as images
                    "data": tfds.features.Tensor(shape=(), dtype=np.object_),  # the file's bytes, b"" if referenced
                }
            ),
        }
    )


def embedded_bytes(file: str, record: int, medium: int) -> bytes:
    """The bytes of a medium in a record. Raises UserError."""
    data = read_record(file, record)["media"]["data"]
    if medium >= len(data) or not data[medium]:
        raise UserError(f"{file}{MEMBER}{record}/{medium}: no such medium in this dataset")
    return bytes(data[medium])


def read_record(file: str, number: int) -> dict[str, Any]:
    encoder, reader = _opened(file)
    record: dict[str, Any] = encoder.deserialize_example_np(reader.read([number])[0])
    return record


@functools.lru_cache(maxsize=1024)
def _opened(file: str) -> tuple[Any, Any]:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        return features(), ArrayRecordReader(file)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{file}: not a readable ArrayRecord file ({one_line(error)[:120]})") from None
