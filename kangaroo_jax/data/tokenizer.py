"""Text to token ids and back: three kinds of tokenizer behind one interface.

    kind            file                            read by
    llama3_json     tokenizer.json                  `tokenizers`
    llama3_tiktoken tokenizer.model (base64 ranks)  `tiktoken`
    sentencepiece   *.model                         `sentencepiece`

Text never becomes a special token: whatever a user or a data set writes, `<|eot_id|>` and `<video>`
included, is spelled out in ordinary pieces. Special tokens are placed by id, by the chat template alone.
"""

import base64
import binascii
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from kangaroo_jax.errors import UserError, one_line
from kangaroo_jax.system.json_text import parse_json

SPECIAL_NAMES = {
    "bos": "<|begin_of_text|>",
    "eos": "<|end_of_text|>",
    "start_header": "<|start_header_id|>",
    "end_header": "<|end_header_id|>",
    "eot": "<|eot_id|>",
    "vi_start": "<vi_start>",
    "eof": "<eof>",
    "eov": "<eov>",
    "vi_end": "<vi_end>",
    "vision": "<vision>",
}
WHOLE_PIECES = ("\n\n",)  # pieces of SentencePiece models trained here that are matched before any merge
# Ids of special tokens in SentencePiece models trained here; unknown is 0.
SENTENCEPIECE_IDS = {
    "bos": 1,
    "eos": 2,
    "start_header": 3,
    "end_header": 4,
    "eot": 5,
    "vi_start": 6,
    "eof": 7,
    "eov": 8,
    "vi_end": 9,
    "vision": 10,
}
# Llama-3's own specials, as offsets from the number of ordinary tokens (128,000), and the reserved ones
# that Kangaroo renames. 128006, 128007 and 128009 belong to the chat template, so that the placeholder,
# which never reaches the embedding, takes the first reserved id above them in Llama 3 and in 3.1.
LLAMA3_OFFSETS = {
    "bos": 0,
    "eos": 1,
    "start_header": 6,
    "end_header": 7,
    "eot": 9,
    "vi_start": 2,
    "eof": 3,
    "eov": 4,
    "vi_end": 5,
    "vision": 11,
}
LLAMA3_SPECIALS = 256
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
KNOWN_PATTERNS = (LLAMA3_PATTERN,)
MOST_PARTS = 32  # parts of a normalizer, pre-tokenizer or decoder
LARGEST_GROWTH = 64  # factor by which all replacements together may lengthen a text
LARGEST_JSON = 128 << 20  # bytes of a tokenizer.json; Llama 3's is 9 MB
# tiktoken recurses on long runs: text is cut inside longer runs of characters of one sort (blank or not).
_LONGEST_TEXT = 400_000
_LONGEST_RUN = 25_000
_SPACE_MARK = "\u2581"  # SentencePiece's own sign for a space


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """One interface for every kind. Ids are ints in 0..vocab_size-1.

    `vision` is the id of the placeholder at the position of a vision token; it is never embedded.
    """

    kind: str
    vocab_size: int
    bos: int
    eos: int
    eot: int
    start_header: int
    end_header: int
    vi_start: int
    eof: int
    eov: int
    vi_end: int
    vision: int
    _encode: Callable[[str], list[int]] = dataclasses.field(repr=False)
    _decode: Callable[[list[int]], str] = dataclasses.field(repr=False)
    _special: Mapping[int, str] = dataclasses.field(repr=False)

    @property
    def stop_ids(self) -> tuple[int, int]:
        """The ids that end an answer: end of text and end of turn."""
        return (self.eos, self.eot)

    def encode(self, text: str) -> list[int]:
        """Plain text to ids; special tokens in it are encoded as ordinary text. No token is added at either end."""
        return self._encode(text.encode("utf-8", "replace").decode("utf-8"))  # lone surrogates become "?"

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; bytes that are not UTF-8 become U+FFFD.

        Special tokens are left out, and so are ids without a token (a model may have more rows than the tokenizer).
        """
        return self._decode([i for i in map(int, ids) if self.shows(i)])

    def shows(self, token: int) -> bool:
        """Whether `decode` has text for a token: it has none for special and unknown tokens."""
        return 0 <= token < self.vocab_size and token not in self._special

    def name(self, token: int) -> str | None:
        """The name of a special token, None for an ordinary one."""
        return self._special.get(int(token))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer file, or a folder that holds tokenizer.json or tokenizer.model; the kind is detected.

    Raises:
        UserError: the file is missing, of no known kind, or without the special tokens needed.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        if not found:
            raise UserError(f"{path}: no tokenizer.json or tokenizer.model in this folder")
        path = found[0]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the tokenizer ({error.strerror or error}); Llama-3's tokenizer.json or "
            "tokenizer.model comes with its weights, the quickstart leaves one for the preset tiny in its workdir"
        ) from None
    if data.lstrip()[:1] == b"{":
        return _from_json(path, data)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
        return _from_ranks(path, data)
    return _from_sentencepiece(path, data)


# -------------------------------------------------------------------------- tokenizer.json


def _from_json(path: Path, data: bytes) -> Tokenizer:
    """A tokenizer.json, by `tokenizers`. Special tokens in text become ordinary pieces; other added tokens match."""
    import tokenizers

    if len(data) > LARGEST_JSON:
        raise UserError(f"{path}: {len(data)} bytes are no tokenizer.json; is it the right file?")
    spec = parse_json(data, str(path))
    try:
        for entry in spec["added_tokens"]:
            entry["special"] = entry.get("special") is not False or entry["content"] in SPECIAL_NAMES.values()
        added = {int(entry["id"]): str(entry["content"]) for entry in spec["added_tokens"]}
        special = {int(entry["id"]): added[int(entry["id"])] for entry in spec["added_tokens"] if entry["special"]}
        _check_parts(spec, path)
        spec.update(post_processor=None, truncation=None, padding=None)
        reader = tokenizers.Tokenizer.from_str(json.dumps(spec))
        reader.encode_special_tokens = True
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:  # the package raises bare Exception and Rust panics (BaseException)
        raise UserError(f"{path}: not a tokenizer.json ({one_line(error)[:160]})") from None
    by_name = {name: token for token, name in special.items()}
    ordinary = reader.get_vocab_size(with_added_tokens=False)
    ids = {}
    for role, name in SPECIAL_NAMES.items():
        reserved = ordinary + LLAMA3_OFFSETS[role]
        if name in by_name:
            ids[role] = by_name[name]
        elif role in ("vi_start", "eof", "eov", "vi_end", "vision") and reserved in special:
            ids[role] = reserved
        else:
            raise UserError(f"{path}: no {name} among its added tokens; give the tokenizer of a Llama-3 model")
    return Tokenizer(
        kind="llama3_json",
        vocab_size=max(ordinary, *(token + 1 for token in added)),
        **ids,
        _encode=lambda text: _read_by(path, reader.encode, text, add_special_tokens=False).ids,
        _decode=lambda tokens: _read_by(path, reader.decode, tokens, skip_special_tokens=False),
        _special=special,
    )


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


def _parts(part: Any) -> Iterable[Mapping[str, Any]]:
    """The elementary parts that a part of a tokenizer.json consists of."""
    if part is None:
        return
    if part.get("type") != "Sequence":
        yield part
    for key in ("normalizers", "pretokenizers", "decoders"):
        for inner in part.get(key) or ():
            yield from _parts(inner)


# ------------------------------------------------------------------- tokenizer.model, Llama 3


def _from_ranks(path: Path, data: bytes) -> Tokenizer:
    """A tiktoken file: a line of base64 bytes and a rank for each ordinary token; the specials follow them."""
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
    special = {len(ranks) + i: f"<|special_{i}|>" for i in range(LLAMA3_SPECIALS)}
    ids = {role: len(ranks) + offset for role, offset in LLAMA3_OFFSETS.items()}
    special.update({token: SPECIAL_NAMES[role] for role, token in ids.items()})
    return Tokenizer(
        kind="llama3_tiktoken",
        vocab_size=len(ranks) + LLAMA3_SPECIALS,
        **ids,
        _encode=lambda text: [i for part in _short_parts(text) for i in coder.encode_ordinary(part)],
        _decode=lambda tokens: coder.decode(tokens, errors="replace"),
        _special=special,
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


# ---------------------------------------------------------------------------- SentencePiece


def _from_sentencepiece(path: Path, data: bytes) -> Tokenizer:
    """A SentencePiece model with byte fallback and our special ids, as `train_sentencepiece` makes it."""
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(data)
    except Exception:  # a RuntimeError with a C++ message
        raise UserError(
            f"{path}: neither a tokenizer.json nor a tiktoken or SentencePiece model; is it the right file?"
        ) from None
    for role, token in SENTENCEPIECE_IDS.items():
        if token >= model.GetPieceSize() or model.IdToPiece(token) != SPECIAL_NAMES[role]:
            raise UserError(
                f"{path}: token {token} is not {SPECIAL_NAMES[role]}; make the model with train_sentencepiece"
            )
    mark = model.PieceToId([f"<0x{byte:02X}>" for byte in _SPACE_MARK.encode()])
    if model.unk_id() in mark:
        raise UserError(f"{path}: no byte fallback; make the model with train_sentencepiece")

    def encode(text: str) -> list[int]:
        head, *rest = text.split(_SPACE_MARK)  # the sign itself is encoded by its bytes, or it would become a space
        ids: list[int] = model.EncodeAsIds(head)
        for part in rest:
            ids += mark + model.EncodeAsIds(part)
        return ids

    return Tokenizer(
        kind="sentencepiece",
        vocab_size=model.GetPieceSize(),
        **SENTENCEPIECE_IDS,
        _encode=encode,
        _decode=model.DecodeIds,
        _special={0: "<unk>", **{token: SPECIAL_NAMES[role] for role, token in SENTENCEPIECE_IDS.items()}},
    )


def train_sentencepiece(
    texts: Iterable[str],
    path: str | Path,
    vocab_size: int,
    *,
    split_digits: bool = True,
    space_after: bool = False,
) -> Path:
    """Train a byte-pair SentencePiece model on `texts` and write it to `path`. The same texts give the same file.

    Any Unicode text survives encoding and decoding unchanged: there is no normalisation, no added or dropped space,
    and characters without a piece are encoded as bytes. Two newlines are one piece, as in Llama 3. With
    `split_digits` each digit is a separate piece, otherwise numbers that are frequent in `texts` become pieces.
    A space belongs to the word that follows it, or with `space_after` to the word before it.
    The most frequent characters get a piece, up to half of the vocabulary that bytes and specials leave.

    Raises:
        UserError: `texts` give too few different pieces for `vocab_size`, or it leaves no room.
    """
    import sentencepiece

    path = Path(path)
    lines = [line for text in texts for line in re.split(r"[\r\n\t]+", text) if line.strip()]
    room = vocab_size - 256 - 2 - len(SENTENCEPIECE_IDS)
    if room < 16:
        raise UserError(f"vocab_size {vocab_size} is too small: bytes and special tokens take {vocab_size - room}")
    counts = Counter(char for line in lines for char in line)
    frequent = sorted(counts, key=lambda char: (-counts[char], char))
    if rare := "".join(frequent[room // 2 :]):  # these are encoded as bytes
        lines = [part for line in lines for part in re.split(f"[{re.escape(rare)}]+", line) if part.strip()]
    names = {token: SPECIAL_NAMES[role] for role, token in SENTENCEPIECE_IDS.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=iter(lines),
                model_writer=file,
                vocab_size=vocab_size,
                model_type="bpe",
                character_coverage=1.0,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                byte_fallback=True,
                split_digits=split_digits,
                treat_whitespace_as_suffix=space_after,
                user_defined_symbols=list(WHOLE_PIECES),
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,
                bos_piece=names[1],
                eos_piece=names[2],
                control_symbols=[names[i] for i in range(3, len(names) + 1)],
                num_threads=1,
                input_sentence_size=0,
                max_sentence_length=1 << 20,
                minloglevel=2,
            )
    except (RuntimeError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot train {vocab_size} tokens on {sum(counts.values())} characters ({one_line(error)[:160]}); "
            "give more text or a smaller vocab_size"
        ) from None
    temporary.replace(path)
    return path
