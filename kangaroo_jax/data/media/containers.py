"""Media inside containers: slices of tar archives, cells of Parquet tables, records of built datasets."""

import dataclasses
import io
import os
import re
from pathlib import Path
from typing import BinaryIO

from kangaroo_jax.data.media.addresses import is_remote
from kangaroo_jax.data.media.storage import MEMBER
from kangaroo_jax.errors import UserError

_TAR_MEMBER = re.compile(r"^(.*)@(\d+)\+(\d+)$", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Member:
    """A medium inside a container: `label` for messages, a slice of a file, or its bytes."""

    label: str
    file: Path
    offset: int = 0
    size: int = 0
    data: bytes | None = None

    def read(self) -> bytes:
        """The medium's bytes. Raises UserError."""
        if self.data is not None:
            return self.data
        try:
            with self.file.open("rb") as file:
                return os.pread(file.fileno(), self.size, self.offset)
        except OSError as error:
            raise UserError(f"{self.label}: cannot read {self.file} ({error.strerror or error})") from None

    def ffmpeg_input(self) -> str | BinaryIO:
        """What `av.open` takes: FFmpeg's own `subfile` protocol for a slice of a file."""
        if self.data is not None:
            return io.BytesIO(self.data)
        return f"subfile,,start,{self.offset},end,{self.offset + self.size},,:{self.file}"


def member_of(path: str | Path) -> Member | None:
    """The member that a path names, None if it is a plain file. Raises UserError."""
    text = str(path)
    if MEMBER not in text or is_remote(text) or os.path.exists(text):
        return None
    container, _, name = text.partition(MEMBER)
    if match := _TAR_MEMBER.match(name):
        return Member(text, Path(container), int(match[2]), int(match[3]))
    if container.lower().endswith(".parquet"):
        from kangaroo_jax.data.media.tables import parquet_bytes

        return Member(text, Path(container), data=parquet_bytes(text, container, name))
    if ".array_record" in container:
        from kangaroo_jax.data.media.array_record import embedded_bytes

        record, _, medium = os.path.splitext(name)[0].partition("/")
        return Member(text, Path(container), data=embedded_bytes(container, int(record), int(medium)))
    return None


def member_suffix(path: str | Path) -> str:
    """The ending of a file's or member's name, lower case, "" if there is none."""
    name = str(path)
    if MEMBER in name:
        name = re.sub(r"@\d+\+\d+$", "", name)
    return os.path.splitext(name)[1].lower()
