"""Text to token ids and back: three kinds of tokenizer behind one interface.

    kind            file                            read by
    llama3_json     tokenizer.json, Llama 3's       `tokenizers`
    json            any other tokenizer.json        `tokenizers`
    llama3_tiktoken tokenizer.model (base64 ranks)  `tiktoken`
    sentencepiece   *.model                         `sentencepiece`

A GGUF file's metadata are read as the tokenizer.json that they hold.

Text never becomes a special token: whatever a user or a data set writes, `<|eot_id|>` and `<video>`
included, is spelled out in ordinary pieces. Special tokens are placed by id, by the chat format alone
(`data.chat_format`): Llama 3's, or that of the template beside the tokenizer.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.data.chat_format import (
    CHATML,
    FORMAT_FILE,
    ChatFormat,
    ChatSettings,
    Special,
    llama3_format,
    settings_beside,
    template_format,
    writes_llama3,
)
from kangaroo_jax.data.token_bytes import SPACE_MARK, of_piece
from kangaroo_jax.data.tokenizer_gguf import is_gguf, tokenizer_of
from kangaroo_jax.data.tokenizer_json import open_json
from kangaroo_jax.data.tokenizer_ranks import open_ranks
from kangaroo_jax.errors import UserError, one_line

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
MARKS = ("vi_start", "eof", "eov", "vi_end", "vision")  # around a video, and the placeholder in it
_LLAMA3_ROLES = tuple(role for role in SPECIAL_NAMES if role not in MARKS)
_RESERVED = re.compile(r"(?i)reserved|unused|^\[control_\d+\]$|^<SPECIAL_\d+>$")  # names of tokens without a use
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


Spans = Callable[[str], tuple[list[int], Sequence[tuple[int, int]]]]  # text -> ids and the place of each in the text


def whole_characters(text: str) -> str:
    """The text, in which lone surrogates become "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """One interface for every kind. Ids are ints in 0..vocab_size-1.

    `vision` is the id of the placeholder at the position of a vision token; it is never embedded. `own_size` is the
    vocabulary without marks that the file has no tokens for. `stop_ids` end an answer, `prefix` begins plain text.
    `bos` is None where no token begins a text; `settings` is None, and the headers are not, where the chat format is
    Llama 3's. `spans` gives the ids of text after other text and the place of each in it; it is None where that is not
    known.
    """

    kind: str
    vocab_size: int
    own_size: int
    bos: int | None
    eos: int
    eot: int
    stop_ids: tuple[int, ...]
    prefix: tuple[int, ...]
    start_header: int | None
    end_header: int | None
    format: ChatFormat = dataclasses.field(repr=False)
    settings: ChatSettings | None = dataclasses.field(repr=False)
    spans: Spans | None = dataclasses.field(repr=False)
    vi_start: int
    eof: int
    eov: int
    vi_end: int
    vision: int
    _encode: Callable[[str], list[int]] = dataclasses.field(repr=False)
    _decode: Callable[[list[int]], str] = dataclasses.field(repr=False)
    _as_bytes: Callable[[int], bytes] = dataclasses.field(repr=False)
    _special: Mapping[int, str] = dataclasses.field(repr=False)

    def encode(self, text: str) -> list[int]:
        """Plain text to ids; special tokens in it are encoded as ordinary text. No token is added at either end."""
        return self._encode(whole_characters(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; bytes that are not UTF-8 become U+FFFD.

        Special tokens are left out, and so are ids without a token (a model may have more rows than the tokenizer).
        """
        return self._decode([i for i in map(int, ids) if self.shows(i)])

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to a text in UTF-8, maybe a part of a character; nothing if `decode` leaves it out."""
        return self._as_bytes(token) if self.shows(token) else b""

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
    path = tokenizer_file(path)
    if path.is_dir():
        raise UserError(f"{path}: no tokenizer.json or tokenizer.model in this folder")
    if is_gguf(path):
        data, settings = tokenizer_of(path)
        return _from_json(path, data, settings)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the tokenizer ({error.strerror or error}); Llama-3's tokenizer.json or "
            "tokenizer.model comes with its weights, the quickstart leaves one for the preset tiny in its workdir"
        ) from None
    if data.lstrip()[:1] == b"{":
        return _from_json(path, data, settings_beside(path))
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
        return _from_ranks(path, data)
    return _from_sentencepiece(path, data)


def tokenizer_files(source: str | Path) -> dict[str, bytes]:
    """Name -> contents of the files that a folder needs to have the tokenizer of `source` (see `load_tokenizer`).

    Raises UserError for a file that is no tokenizer.
    """
    source = tokenizer_file(source)
    tokenizer = load_tokenizer(source)
    if is_gguf(source):
        files = {"tokenizer.json": tokenizer_of(source)[0]}
    else:
        files = {f"tokenizer{source.suffix}": source.read_bytes()}
    return files | ({FORMAT_FILE: tokenizer.settings.to_json().encode()} if tokenizer.settings is not None else {})


def tokenizer_file(path: str | Path) -> Path:
    """The file that `load_tokenizer` reads: `path`, or the one in that folder."""
    path = Path(path)
    names = ("tokenizer.json", "tokenizer.model")
    return next((path / name for name in names if (path / name).is_file()), path) if path.is_dir() else path


# -------------------------------------------------------------------------- tokenizer.json


@dataclasses.dataclass(frozen=True)
class _Read:
    """What a file gives of a tokenizer; `size` is one more than its largest id."""

    kind: str
    size: int
    special: Mapping[int, str]
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    as_bytes: Callable[[int], bytes]
    flags: Mapping[str, Special]
    spans: Spans | None = None


def _from_json(path: Path, data: bytes, settings: ChatSettings) -> Tokenizer:
    """A tokenizer.json. Special tokens in text become ordinary pieces; other added tokens match."""
    reader = open_json(path, data, SPECIAL_NAMES.values())
    size = max(reader.ordinary, *(token + 1 for token in reader.added), 0)
    by_name = {name: token for token, name in reader.special.items()}
    ids = {role: by_name[name] for role, name in SPECIAL_NAMES.items() if name in by_name}
    if all(role in ids for role in _LLAMA3_ROLES):
        reserved = {role: reader.ordinary + LLAMA3_OFFSETS[role] for role in MARKS if role not in ids}
        ids |= {role: token for role, token in reserved.items() if token in reader.special}
    text = (reader.encode, reader.decode, reader.as_bytes)
    read = _Read("json", size, reader.special, *text, reader.flags, reader.spans)
    return _finished(path, read, ids, settings)


def _finished(path: Path, read: _Read, ids: Mapping[str, int], settings: ChatSettings) -> Tokenizer:
    """The tokenizer, with its chat format and ids for all of MARKS.

    A mark that has no id takes a reserved token, or a new one after the others. Raises UserError if nothing says how
    the turns of a conversation are written.
    """
    names, ids = {name: token for token, name in read.special.items()}, dict(ids)
    plain = None
    if all(role in ids for role in _LLAMA3_ROLES):
        plain = llama3_format(ids["bos"], (ids["start_header"], ids["end_header"]), ids["eot"], read.encode)
        if not settings.template or writes_llama3(settings, plain, read.flags, read.encode, path):
            settings = ChatSettings()
    elif not settings.template and {"<|im_start|>", "<|im_end|>"} <= names.keys():
        tokens = {"eos_token": "<|im_end|>", **settings.tokens}
        settings = dataclasses.replace(settings, template=CHATML, tokens=tokens)
    elif not settings.template:
        raise UserError(
            f"{path}: has neither Llama 3's marks nor ChatML's, and no chat template stands beside it; put the model's "
            "tokenizer_config.json or chat_template.jinja there"
        )
    if not settings.template:
        assert plain is not None
        chat: dict[str, Any] = dict(bos=ids["bos"], eos=ids["eos"], prefix=(ids["bos"],), format=plain, settings=None)
        chat |= dict(eot=ids["eot"], stop_ids=(ids["eos"], ids["eot"]))
        chat |= {role: ids[role] for role in ("start_header", "end_header")}
    else:
        chat = _by_template(path, read, settings, names)
    special = dict(read.special)
    size = max(read.size, *(ids[role] + 1 for role in MARKS if role in ids), 0)
    used = {*ids.values(), *chat["stop_ids"], *(names.get(text) for text in settings.tokens.values())}
    free = [token for token, name in sorted(special.items()) if token not in used and _RESERVED.search(name)]
    lacking = [role for role in MARKS if role not in ids]
    if len(free) < len(lacking):
        free = list(range(size, size + len(lacking)))
    ids |= dict(zip(lacking, free, strict=False))
    special |= {ids[role]: SPECIAL_NAMES[role] for role in lacking}
    return Tokenizer(
        kind="llama3_json" if read.kind == "json" and not settings.template else read.kind,
        vocab_size=max(size, *(ids[role] + 1 for role in MARKS)),
        own_size=size,
        **chat,
        vi_start=ids["vi_start"],
        eof=ids["eof"],
        eov=ids["eov"],
        vi_end=ids["vi_end"],
        vision=ids["vision"],
        spans=read.spans,
        _encode=read.encode,
        _decode=read.decode,
        _as_bytes=read.as_bytes,
        _special=special,
    )


def _by_template(path: Path, read: _Read, settings: ChatSettings, names: Mapping[str, int]) -> dict[str, Any]:
    """What of a tokenizer follows from a chat template."""
    chat = template_format(settings, read.flags, None if read.spans else read.encode, path)
    bos, eos = (names.get(settings.tokens.get(f"{role}_token", "")) for role in ("bos", "eos"))
    stop = dict.fromkeys((*settings.stop_ids, *((eos,) if eos is not None else ()), chat.eot))
    if any(token >= read.size for token in stop):
        raise UserError(f"{path}: the ids {list(stop)} that end an answer are not all of this tokenizer")
    return dict(
        bos=bos,
        eos=chat.eot if eos is None else eos,
        eot=chat.eot,
        stop_ids=tuple(stop),
        prefix=(bos,) if bos is not None and settings.begins else (),
        format=chat,
        settings=settings,
        start_header=None,
        end_header=None,
    )


def _from_ranks(path: Path, data: bytes) -> Tokenizer:
    """A tiktoken file: a line of base64 bytes and a rank for each ordinary token; the specials follow them."""
    reader = open_ranks(path, data)
    count = reader.ordinary
    special = {count + i: f"<|special_{i}|>" for i in range(LLAMA3_SPECIALS)}
    ids = {role: count + offset for role, offset in LLAMA3_OFFSETS.items()}
    special.update({token: SPECIAL_NAMES[role] for role, token in ids.items()})
    flags = {name: Special(token) for token, name in special.items()}
    size = count + LLAMA3_SPECIALS
    read = _Read("llama3_tiktoken", size, special, reader.encode, reader.decode, reader.as_bytes, flags)
    return _finished(path, read, ids, settings_beside(path))


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
    mark = model.PieceToId([f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()])
    if model.unk_id() in mark:
        raise UserError(f"{path}: no byte fallback; make the model with train_sentencepiece")

    def encode(text: str) -> list[int]:
        head, *rest = text.split(SPACE_MARK)  # the sign itself is encoded by its bytes, or it would become a space
        ids: list[int] = model.EncodeAsIds(head)
        for part in rest:
            ids += mark + model.EncodeAsIds(part)
        return ids

    special = {0: "<unk>", **{token: SPECIAL_NAMES[role] for role, token in SENTENCEPIECE_IDS.items()}}
    read = _Read(
        kind="sentencepiece",
        size=model.GetPieceSize(),
        special=special,
        encode=encode,
        decode=model.DecodeIds,
        as_bytes=lambda token: of_piece(model.IdToPiece(token)),
        flags={name: Special(token) for token, name in special.items()},
    )
    return _finished(path, read, SENTENCEPIECE_IDS, settings_beside(path))


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
