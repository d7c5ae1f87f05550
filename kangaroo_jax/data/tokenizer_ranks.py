"""Reads Llama 3's tokenizer.model, by `tiktoken`: a line of base64 bytes and a rank for each ordinary token."""

import base64
import binascii
import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from kangaroo_jax.data.tokenizer_json import LLAMA3_PATTERN
from kangaroo_jax.errors import UserError

# tiktoken recurses on long runs: text is cut inside longer runs of characters of one sort (blank or not).
_LONGEST_TEXT = 400_000
_LONGEST_RUN = 25_000


@dataclasses.dataclass(frozen=True)
class RanksReader:
    """A tiktoken file in use; `ordinary` is the number of its tokens."""

    ordinary: int
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    as_bytes: Callable[[int], bytes]


def open_ranks(path: Path, data: bytes) -> RanksReader:
    """Read a tiktoken file. Raises UserError for a damaged one."""
    import tiktoken

    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"{path}, line {number}: expected base64 bytes and a rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{path}: ranks are not 0 to {len(ranks) - 1}, each once; the file is damaged or cut short")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"{path}: no rank for {len(missing)} of the 256 single bytes; the file is damaged")
    coder = tiktoken.Encoding(
        name=path.stem, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}, explicit_n_vocab=len(ranks)
    )

    def encode(text: str) -> list[int]:
        return [i for part in _short_parts(text) for i in coder.encode_ordinary(part)]

    return RanksReader(
        ordinary=len(ranks),
        encode=encode,
        decode=lambda tokens: coder.decode(tokens, errors="replace"),
        as_bytes=coder.decode_single_token_bytes,
    )


_RUNS = re.compile(rf"(?:\S{{1,{_LONGEST_RUN}}}|\s{{1,{_LONGEST_RUN}}})")


def _short_parts(text: str) -> Iterable[str]:
    """Cut text where tiktoken would run out of stack: every 400,000 characters, and inside very long runs."""
    for begin in range(0, len(text), _LONGEST_TEXT):
        part = text[begin : begin + _LONGEST_TEXT]
        start = end = 0
        blank = None
        for run in _RUNS.finditer(part):
            is_blank = run.group()[0].isspace()
            if is_blank == blank:  # the same run continues: it was too long
                yield part[start:end]
                start = end
            blank, end = is_blank, run.end()
        yield part[start:]
