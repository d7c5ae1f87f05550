"""Reads a tokenizer.json of Hugging Face, by `tokenizers`: only parts that are known to take linear time."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.data.chat_format import Special
from kangaroo_jax.data.token_bytes import of_json
from kangaroo_jax.errors import UserError, one_line
from kangaroo_jax.system.json_text import parse_json

# Llama-3's pre-tokenization pattern (the model's published tokenizer.json and reference encoder).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The allowed parts of a tokenizer.json: each takes linear time and lengthens the text only a few times.
KNOWN_PARTS = (
    *("NFC", "NFD", "NFKC", "NFKD", "Prepend", "Replace", "Lowercase", "Strip"),
    *("ByteLevel", "Split", "Digits", "Metaspace", "Punctuation", "Whitespace", "WhitespaceSplit"),
    *("ByteFallback", "Fuse"),
)
KNOWN_MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORDS}|\p{{N}}|{_REST}"
# Patterns by which public tokenizers cut text before they merge; each takes linear time.
KNOWN_PATTERNS = (
    LLAMA3_PATTERN,
    QWEN2_PATTERN,
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2's
    "[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    r"\p{N}",
    r"\p{N}{1,3}",
    "[0-9]",
    "[0-9][0-9][0-9]",
    " ",
)
MOST_PARTS = 32  # parts of a normalizer, pre-tokenizer or decoder
LARGEST_GROWTH = 64  # factor by which all replacements together may lengthen a text
LARGEST_JSON = 128 << 20  # bytes of a tokenizer.json; Llama 3's is 9 MB


@dataclasses.dataclass(frozen=True)
class JsonReader:
    """A tokenizer.json in use.

    Attributes:
        ordinary: the number of tokens without the added ones.
        added: id -> text of the added tokens.
        special: those of them that are special.
        flags: the special ones by their text.
        encode: text to ids; special tokens in it become ordinary pieces, other added tokens match.
        spans: (ids, the place in the text of each) of text after other text.
        decode: ids to text.
        as_bytes: the bytes of a token.
    """

    ordinary: int
    added: Mapping[int, str]
    special: Mapping[int, str]
    flags: Mapping[str, Special]
    encode: Callable[[str], list[int]]
    spans: Callable[[str], tuple[list[int], Sequence[tuple[int, int]]]]
    decode: Callable[[list[int]], str]
    as_bytes: Callable[[int], bytes]


def open_json(path: Path, data: bytes, marks: Iterable[str]) -> JsonReader:
    """Read a tokenizer.json; tokens named in `marks` are special. Raises UserError."""
    import tokenizers

    if len(data) > LARGEST_JSON:
        raise UserError(f"{path}: {len(data)} bytes are no tokenizer.json; is it the right file?")
    spec, marks = parse_json(data, str(path)), set(marks)
    try:
        for entry in spec["added_tokens"]:
            entry["special"] = entry.get("special") is not False or entry["content"] in marks
        added = {int(entry["id"]): str(entry["content"]) for entry in spec["added_tokens"]}
        special = {int(entry["id"]): added[int(entry["id"])] for entry in spec["added_tokens"] if entry["special"]}
        flags = {
            str(entry["content"]): Special(int(entry["id"]), bool(entry.get("lstrip")), bool(entry.get("rstrip")))
            for entry in spec["added_tokens"]
            if entry["special"]
        }
        _check_parts(spec, path)
        spec.update(post_processor=None, truncation=None, padding=None)
        reader = tokenizers.Tokenizer.from_str(json.dumps(spec))
        inner = tokenizers.Tokenizer.from_str(json.dumps(spec)) if _spaces_first(spec) else reader
        reader.encode_special_tokens = inner.encode_special_tokens = True
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:  # the package raises bare Exception and Rust panics (BaseException)
        raise UserError(f"{path}: not a tokenizer.json ({one_line(error)[:160]})") from None

    def spans(text: str) -> tuple[list[int], Sequence[tuple[int, int]]]:
        found = _read_by(path, inner.encode, text, add_special_tokens=False)
        return found.ids, found.offsets

    as_bytes = of_json(_parts(spec.get("decoder")), added)
    return JsonReader(
        ordinary=reader.get_vocab_size(with_added_tokens=False),
        added=added,
        special=special,
        flags=flags,
        encode=lambda text: _read_by(path, reader.encode, text, add_special_tokens=False).ids,
        spans=spans,
        decode=lambda tokens: _read_by(path, reader.decode, tokens, skip_special_tokens=False),
        as_bytes=lambda token: as_bytes(token, reader.id_to_token(token) or ""),
    )


def _spaces_first(spec: dict[str, Any]) -> bool:
    """Whether a space goes before the first text alone; then it goes before none, in place, for text after other."""
    parts = [part for part in _parts(spec.get("pre_tokenizer")) if part.get("prepend_scheme") == "first"]
    for part in parts:
        part["prepend_scheme"] = "never"
    return bool(parts)


def _read_by(path: Path, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The result of a call of the package. Raises UserError where the file lacks what the call needs."""
    try:
        return call(*arguments, **options)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # see `_from_json`
        raise UserError(f"{path}: cannot be used for this text ({one_line(error)[:160]})") from None


def _check_parts(spec: Mapping[str, Any], path: Path) -> None:
    """Raise UserError if a tokenizer.json has parts that may run without end or lengthen a text without bound."""
    for kind in ("normalizer", "pre_tokenizer", "decoder"):
        growth, parts = 1.0, list(_parts(spec.get(kind)))
        if len(parts) > MOST_PARTS:
            raise UserError(f"{path}: a {kind} of {len(parts)} parts; more than {MOST_PARTS} are not read")
        for part in parts:
            name = part.get("type")
            if name not in KNOWN_PARTS:
                raise UserError(f"{path}: {kind} {name!r} is not read; known are {', '.join(KNOWN_PARTS)}")
            pattern = part.get("pattern") or {"String": " "}
            if "Regex" in pattern and pattern["Regex"] not in KNOWN_PATTERNS:
                raise UserError(f"{path}: the {kind}'s pattern {pattern['Regex']!r} is unknown; not read")
            longest = max((len(str(part.get(key) or "")) for key in ("content", "prepend", "replacement")), default=0)
            if longest > 8 or pattern.get("String") == "":
                raise UserError(f"{path}: the {kind} {name!r} puts {longest} characters in place of a few; not read")
            if name == "Replace":
                growth *= max(1.0, longest / len(pattern.get("String") or "x"))
        if growth > LARGEST_GROWTH:
            raise UserError(f"{path}: the {kind} may make a text {growth:,.0f} times as long; not read")
    model = spec["model"]
    if model.get("type", "BPE") not in KNOWN_MODELS or model.get("dropout"):
        raise UserError(f"{path}: its model is not read; known are {', '.join(KNOWN_MODELS)}, without dropout")


def _parts(part: Any) -> Iterable[dict[str, Any]]:
    """The elementary parts that a part of a tokenizer.json consists of."""
    if part is None:
        return
    if part.get("type") != "Sequence":
        yield part
    for key in ("normalizers", "pretokenizers", "decoders"):
        for inner in part.get(key) or ():
            yield from _parts(inner)
