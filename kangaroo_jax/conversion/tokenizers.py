"""Converts any of our tokenizers to a tokenizer.json that transformers loads without extra code."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kangaroo_jax.data.chat_format import LLAMA3
from kangaroo_jax.data.tokenizer import (
    LLAMA3_OFFSETS,
    LLAMA3_SPECIALS,
    MARKS,
    SENTENCEPIECE_IDS,
    SPECIAL_NAMES,
    WHOLE_PIECES,
    Tokenizer,
    load_tokenizer,
    tokenizer_files,
)
from kangaroo_jax.data.tokenizer_gguf import is_gguf
from kangaroo_jax.data.tokenizer_json import LLAMA3_PATTERN
from kangaroo_jax.system.json_text import read_json


def write_tokenizer(source: Path, config: ConfigDict, folder: Path, *, marks: bool = True) -> dict[str, Any]:
    """Write tokenizer.json, tokenizer_config.json and the chat template, and copy the source file.

    `marks` says whether the marks around a video are among its tokens, where the source has none to spare. Returns the
    keys of config.json that name tokens. Raises UserError for a file that is no tokenizer, or has a larger vocabulary
    than the model.
    """
    from kangaroo_jax.errors import UserError

    tokenizer = load_tokenizer(source)
    size = tokenizer.vocab_size if marks else tokenizer.own_size
    if size > config.model.llm.vocab_size:
        raise UserError(
            f"{source}: {size} tokens, but the model knows {config.model.llm.vocab_size}; "
            "give the tokenizer that it was trained with by --tokenizer"
        )
    makers = {"sentencepiece": from_sentencepiece, "llama3_tiktoken": from_ranks}
    target = folder / "tokenizer.json"
    if tokenizer.kind in makers:
        spec = makers[tokenizer.kind](source)
        target.write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
        shutil.copyfile(source, folder / f"kangaroo_{source.name}")
    else:
        data = tokenizer_files(source)["tokenizer.json"] if is_gguf(source) else source.read_bytes()
        target.write_bytes(_with_marks(data, tokenizer, marks))
    template = LLAMA3 if tokenizer.settings is None else tokenizer.settings.template
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **_named_tokens(tokenizer),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max(8192, config.data.tokens_per_pack),
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return _token_keys(tokenizer)


def _named_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """What tokenizer_config.json calls its special tokens."""
    if tokenizer.settings is None:
        bos, eot, eos = map(tokenizer.name, (tokenizer.bos or 0, tokenizer.eot, tokenizer.eos))
        return {"bos_token": bos, "eos_token": eot, "pad_token": eos}
    own = {"eos_token": tokenizer.name(tokenizer.eos), "pad_token": tokenizer.name(tokenizer.eos)}
    begins = {} if tokenizer.settings.begins is None else {"add_bos_token": tokenizer.settings.begins}
    return {**own, **tokenizer.settings.tokens, **begins}


# Keys kept from a tokenizer_config.json: the others name classes and code, which differ between transformers versions.
_CARRIED = (
    *(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")),
    *("additional_special_tokens", "chat_template", "clean_up_tokenization_spaces", "model_max_length"),
    *("model_input_names", "padding_side", "truncation_side"),
)


def carry_settings(source: Path, folder: Path) -> bool:
    """Copy the special tokens and the chat template from beside the tokenizer `source` to the tokenizer in `folder`.

    Any version of transformers reads the result. If `folder` lacks a tokenizer.json, it is copied. Returns whether
    there is one; without it nothing is written. Raises UserError for settings that are no JSON object.
    """
    beside, target = source.parent, folder / "tokenizer_config.json"
    if not (folder / "tokenizer.json").is_file():
        if not (beside / "tokenizer.json").is_file():
            return False
        shutil.copyfile(beside / "tokenizer.json", folder / "tokenizer.json")
    theirs: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (beside / name).is_file():
            theirs |= read_json(beside / name)
    if isinstance(more := theirs.get("extra_special_tokens"), list):  # a list in transformers 5, a mapping in 4
        theirs.setdefault("additional_special_tokens", more)
    if (beside / "chat_template.jinja").is_file():
        theirs["chat_template"] = (beside / "chat_template.jinja").read_text(encoding="utf-8")
    carried = {key: _content(theirs[key]) for key in _CARRIED if theirs.get(key) is not None}
    ours = read_json(target) if target.is_file() else {"clean_up_tokenization_spaces": False}
    settings = {**ours, **carried, "tokenizer_class": "PreTrainedTokenizerFast"}
    target.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if isinstance(template := settings.get("chat_template"), str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return True


def _content(value: Any) -> Any:
    """A token's text, which may be in an `AddedToken` object."""
    if isinstance(value, list):
        return [_content(item) for item in value]
    return value["content"] if isinstance(value, dict) and "content" in value else value


def _with_marks(data: bytes, tokenizer: Tokenizer, marks: bool) -> bytes:
    """A tokenizer.json in which the marks are special tokens; the same bytes where they, or reserved tokens, are."""
    spec = json.loads(data)
    added = {entry["content"]: entry for entry in spec["added_tokens"]}
    odd = [entry for name, entry in added.items() if name in SPECIAL_NAMES.values() and not entry.get("special")]
    for entry in odd:
        entry["special"] = True
    new = {getattr(tokenizer, role): SPECIAL_NAMES[role] for role in MARKS if marks}
    new = {token: name for token, name in new.items() if token >= tokenizer.own_size}
    if not odd and not new:
        return data
    spec["added_tokens"] += _added(new)
    return json.dumps(spec, ensure_ascii=False).encode()


def _token_keys(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": list(tokenizer.stop_ids),
        "pad_token_id": tokenizer.eos,
        "header_ids": [tokenizer.start_header, tokenizer.end_header] if tokenizer.settings is None else [],
        "eot_token_id": tokenizer.eot,
    }


def _added(names: dict[int, str]) -> list[dict[str, Any]]:
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return [{"id": token, "content": name, **plain} for token, name in sorted(names.items())]


def _spec(model: dict[str, Any], specials: dict[int, str], **parts: Any) -> dict[str, Any]:
    usual: dict[str, Any] = dict(
        version="1.0", truncation=None, padding=None, normalizer=None, pre_tokenizer=None, post_processor=None
    )
    return {**usual, "added_tokens": _added(specials), **parts, "model": {"type": "BPE", "dropout": None, **model}}


def from_sentencepiece(path: Path) -> dict[str, Any]:
    """A SentencePiece model of `train_sentencepiece` as a tokenizer.json.

    SentencePiece merges the adjacent pieces whose union has the best score. The equivalent merge list has all pairs in
    the order of the score of their union.
    """
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(path.read_bytes())
    pieces = [model.IdToPiece(i) for i in range(model.GetPieceSize())]
    normal = {
        piece
        for i, piece in enumerate(pieces)
        if piece not in WHOLE_PIECES
        and not (model.IsByte(i) or model.IsControl(i) or model.IsUnknown(i) or model.IsUnused(i))
    }
    by_score = sorted((i for i, piece in enumerate(pieces) if piece in normal), key=lambda i: -model.GetScore(i))
    merges = []
    for i in by_score:
        piece = pieces[i]
        splits = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
        merges += [[left, right] for left, right in splits if left in normal and right in normal]
    bpe = {
        "vocab": {piece: i for i, piece in enumerate(pieces)},
        "merges": merges,
        "unk_token": pieces[model.unk_id()],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
    }
    specials = {0: pieces[0], **{token: SPECIAL_NAMES[role] for role, token in SENTENCEPIECE_IDS.items()}}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    decoder = {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    spec = _spec(bpe, specials, normalizer=space, decoder=decoder)
    whole = {i: piece for i, piece in enumerate(pieces) if piece in WHOLE_PIECES}
    spec["added_tokens"] += [{**entry, "special": False} for entry in _added(whole)]
    return spec


def from_ranks(path: Path) -> dict[str, Any]:
    """Llama 3's tokenizer.model (base64 bytes and ranks) as a tokenizer.json."""
    ranks = {}
    for line in path.read_bytes().splitlines():
        piece, rank = line.split()
        ranks[base64.b64decode(piece)] = int(rank)
    letters = _byte_letters()
    spelled = {piece: "".join(letters[byte] for byte in piece) for piece in ranks}
    ordered = sorted(ranks, key=ranks.__getitem__)
    merges = [[spelled[half] for half in halves] for piece in ordered if (halves := _halves(piece, ranks))]
    bpe = {
        "vocab": {spelled[piece]: ranks[piece] for piece in ordered},
        "merges": merges,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,
    }
    offsets = {offset: SPECIAL_NAMES[role] for role, offset in LLAMA3_OFFSETS.items()}
    names = {len(ranks) + i: offsets.get(i, f"<|reserved_special_token_{i}|>") for i in range(LLAMA3_SPECIALS)}
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return _spec(bpe, names, pre_tokenizer={"type": "Sequence", "pretokenizers": [split, level]}, decoder={**level})


def _halves(piece: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens whose merge gives `piece`, found by merging its bytes as the encoder would.

    Empty for a single byte, and for the few pieces that no merge gives: the encoder matches those whole.
    """
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], len(ranks)) for i in range(len(parts) - 1)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[best] >= ranks[piece]:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts if len(parts) == 2 else []


def _byte_letters() -> dict[int, str]:
    """A printable character for every byte: itself if it is printable, else the next from U+0100 on (as in GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    return {**letters, **{byte: chr(0x100 + i) for i, byte in enumerate(others)}}
