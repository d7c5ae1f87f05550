"""The bytes of each token of a tokenizer, which need not be whole characters."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

SPACE_MARK = "\u2581"  # SentencePiece's own sign for a space
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def byte_of_character() -> dict[str, int]:
    """The byte that each character of GPT-2's alphabet stands for.

    Printable characters of Latin-1 stand for themselves; the other bytes, in order, have the characters from 256 on
    (Radford et al. 2019, the published encoder).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def of_piece(piece: str) -> bytes:
    """The bytes of a piece of SentencePiece: U+2581 is a space, `<0x0A>` is a byte."""
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE_MARK, " ").encode()


def of_json(parts: Iterable[Mapping[str, Any]], added: Mapping[int, str]) -> Callable[[int, str], bytes]:
    """What gives the bytes of a token (id, text) of a tokenizer.json, whose decoder has these elementary parts."""
    kinds = {part.get("type") for part in parts}
    alphabet = byte_of_character() if "ByteLevel" in kinds else None

    def of_token(token: int, text: str) -> bytes:
        if token in added:
            return text.encode()
        if alphabet is not None:
            return bytes(alphabet[char] for char in text if char in alphabet)
        return of_piece(text)

    return of_token
