"""GGUF files (llama.cpp): opening one, and the tokenizer that its metadata hold, as a tokenizer.json."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kangaroo_jax.data.chat_format import ChatSettings
from kangaroo_jax.data.tokenizer_json import LLAMA3_PATTERN, QWEN2_PATTERN
from kangaroo_jax.errors import UserError, one_line
from kangaroo_jax.system.installing import install_line

MAGIC = b"GGUF"
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)  # kinds of tokens in llama.cpp
_SPACE = "\u2581"


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def open_gguf(path: Path) -> tuple[Any, dict[str, Any]]:
    """(the package's reader, the metadata: key -> value). Raises UserError for a damaged file."""
    try:
        import gguf
    except ImportError:
        raise UserError(f"{path}: a GGUF, and the package gguf is not installed: {install_line('gguf')}") from None
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:  # a cut file raises whatever numpy does of too few bytes
        raise UserError(
            f"{path}: damaged, cut short, or of another version of GGUF ({one_line(error)[:120]}); download it again"
        ) from None
    size = os.stat(path).st_size
    for tensor in reader.tensors:
        if int(tensor.data_offset) + int(tensor.n_bytes) > size:
            raise UserError(f"{path}: cut short: tensor {tensor.name} is not whole; download it again")
    return reader, metadata


def tokenizer_of(path: Path) -> tuple[bytes, ChatSettings]:
    """(tokenizer.json, the chat's settings) of a GGUF's metadata. Raises UserError for a kind that is not read."""
    _, found = open_gguf(path)
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in found.items()}.get
    kind, names = get("model"), get("tokens")
    if not isinstance(names, list) or not names:
        raise UserError(f"{path}: has no tokenizer; give one by --tokenizer")
    kinds = get("token_type") or [_NORMAL] * len(names)
    if kind not in ("gpt2", "llama") or len(kinds) != len(names):
        raise UserError(f"{path}: its tokenizer, {kind!r}, is not read; give the model's tokenizer.json by --tokenizer")
    spec = _byte_pairs(path, found, names) if kind == "gpt2" else _sentencepiece(found, names, kinds)
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    spec["added_tokens"] = [
        {"id": i, "content": name, **plain, "special": kinds[i] != _USER}
        for i, name in enumerate(names)
        if kinds[i] in (_UNKNOWN, _CONTROL, _USER, _UNUSED)
    ]
    ids = {f"{ours}_token": get(f"{theirs}_token_id") for ours, theirs in _ROLES.items()}
    tokens = {role: names[i] for role, i in ids.items() if isinstance(i, int) and 0 <= i < len(names)}
    stop = [i for i in map(get, ("eos_token_id", "eot_token_id")) if isinstance(i, int)]
    begins = get("add_bos_token", kind == "llama")
    settings = ChatSettings(str(found.get("tokenizer.chat_template") or ""), tokens, tuple(stop), bool(begins))
    return json.dumps(spec, ensure_ascii=False).encode(), settings


_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_EMPTY: dict[str, Any] = dict(version="1.0", truncation=None, padding=None, normalizer=None, post_processor=None)
_BPE = dict(type="BPE", dropout=None, continuing_subword_prefix=None, end_of_word_suffix=None)
_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_LLAMA3_PRES = ("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "falcon3", "pixtral", "dbrx")


def _pre_tokenizer(path: Path, name: str) -> dict[str, Any]:
    """How text is cut before the merges, by llama.cpp's name of it."""

    def split(pattern: str) -> list[dict[str, Any]]:
        cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        return [cut, {**_LEVEL, "use_regex": False}]

    digits = {"type": "Digits", "individual_digits": True}
    parts = {
        **dict.fromkeys(_LLAMA3_PRES, split(LLAMA3_PATTERN)),
        **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), split(QWEN2_PATTERN)),
        **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), [digits]),
        **dict.fromkeys(("default", "gpt-2", "gpt2", ""), []),
    }
    if name not in parts:
        raise UserError(
            f"{path}: cuts text as {name!r}, which is not read; give the model's tokenizer.json by --tokenizer"
        )
    cuts = parts[name] if len(parts[name]) > 1 else [*parts[name], {**_LEVEL, "use_regex": True}]
    return {"type": "Sequence", "pretokenizers": cuts}


def _byte_pairs(path: Path, found: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Byte-level merges, as in GPT-2, with the model's own cut of the text."""
    pre = str(found.get("tokenizer.ggml.pre") or "default")
    merges = [merge.split(" ", 1) for merge in found.get("tokenizer.ggml.merges") or ()]
    model = {**_BPE, "unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": pre in _LLAMA3_PRES}
    return {
        **_EMPTY,
        "normalizer": {"type": "NFC"} if "qwen" in pre else None,
        "pre_tokenizer": _pre_tokenizer(path, pre),
        "decoder": {**_LEVEL, "use_regex": True},
        "model": {**model, "vocab": {name: i for i, name in enumerate(names)}, "merges": merges},
    }


def _sentencepiece(found: Mapping[str, Any], names: list[str], kinds: list[int]) -> dict[str, Any]:
    """SentencePiece's merges: of neighbours whose union is a piece, those with the best score first."""
    scores = found.get("tokenizer.ggml.scores") or [0.0] * len(names)
    normal = {name: i for i, name in enumerate(names) if kinds[i] == _NORMAL}
    merges = []
    for name in sorted(normal, key=lambda name: -scores[normal[name]]):
        halves = [(name[:n], name[n:]) for n in range(1, len(name))]
        merges += [[left, right] for left, right in halves if left in normal and right in normal]
    unknown = next((name for i, name in enumerate(names) if kinds[i] == _UNKNOWN), None)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    before = [{"type": "Prepend", "prepend": _SPACE}] if found.get("tokenizer.ggml.add_space_prefix", True) else []
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if before else []
    model = {**_BPE, "unk_token": unknown, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
    return {
        **_EMPTY,
        "normalizer": {"type": "Sequence", "normalizers": [*before, space]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *after]},
        "model": {**model, "vocab": {name: i for i, name in enumerate(names)}, "merges": merges},
    }
