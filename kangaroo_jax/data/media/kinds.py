"""The kind of a medium by its first bytes: in every large collection some endings are wrong or missing."""

import os
import struct
from pathlib import Path

from kangaroo_jax.data.media.addresses import short
from kangaroo_jax.data.media.containers import member_of
from kangaroo_jax.data.media.storage import check_file, local
from kangaroo_jax.errors import UserError

HEAD = 1 << 16  # bytes that suffice to tell the kind
_PNG = b"\x89PNG\r\n\x1a\n"
_STILLS = (
    b"\xff\xd8\xff",  # JPEG
    b"BM",
    b"II*\0",  # TIFF
    b"MM\0*",
    b"\0\0\0\x0cjP  \r\n\x87\n",  # JPEG 2000
    b"\xff\x4f\xff\x51",
    b"\0\0\1\0",  # icon
    *(b"P%d" % n + space for n in range(1, 8) for space in (b"\n", b" ", b"\r", b"\t")),  # PPM and its kin
)
_VIDEOS = (
    b"\x1aE\xdf\xa3",  # Matroska, WebM
    b"OggS",
    b"FLV\x01",
    b"\0\0\1\xba",  # MPEG program stream
    b"\0\0\1\xb3",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF, WMV
    b"DKIF",
    b".RMF",
    b"nut/multimedia",
)
_MOVIE_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_STILL_BRANDS = (b"avif", b"heic", b"heix", b"mif1")


def kind_of(head: bytes) -> str | None:
    """ "image", "animation" (a picture file that may move: GIF, WebP, PNG) or "video", None if the bytes don't tell.

    Args:
        head: the first bytes of a file, up to `HEAD` of them.
    """
    if head.startswith(_PNG):
        return "animation" if _moves(head) else "image"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "animation" if head[12:16] == b"VP8X" and len(head) > 20 and head[20] & 2 else "image"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "animation"
    if head[:4] == b"RIFF" and head[8:12] in (b"AVI ", b"AVIX"):
        return "video"
    if head[4:8] in _MOVIE_BOXES:
        return "image" if head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS else "video"
    if head.startswith(_VIDEOS) or (head[:1] == b"G" and head[188:189] == b"G") or head[4:5] == b"G" == head[196:197]:
        return "video"  # the last two: transport streams
    return "image" if head.startswith(_STILLS) else None


def is_picture_file(head: bytes) -> bool:
    """Whether Pillow, not FFmpeg, reads the animation in it: WebP and PNG."""
    return head.startswith(_PNG) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def read_head(path: str | Path) -> bytes:
    """The first bytes of a file, address or member of a container. Raises UserError."""
    name = short(path)
    member = member_of(path)
    if member is not None and member.data is not None:
        return member.data[:HEAD]
    file, offset, size = (local(path), 0, HEAD) if member is None else (member.file, member.offset, member.size)
    check_file(file, name)
    try:
        with file.open("rb") as opened:
            return os.pread(opened.fileno(), min(HEAD, size), offset)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}") from None


def _moves(png: bytes) -> bool:
    """Whether a PNG announces an animation before its pixels; an announcement after a large profile is missed."""
    place = len(_PNG)
    while place + 8 <= len(png):
        size, name = struct.unpack_from(">I4s", png, place)
        if name in (b"acTL", b"IDAT"):
            return bool(name == b"acTL")
        place += 12 + size
    return False
