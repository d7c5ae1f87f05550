"""Text as tokens come is the text of all tokens, whatever the tokenizer, the characters and the stop strings."""

import base64
import dataclasses
import itertools
import random
from pathlib import Path

import pytest

from kangaroo_jax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from kangaroo_jax.inference.text import Detokenizer
from tests.data.test_tokenizer import TEXTS, train_json

SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIALS += ["<vi_start>", "<eof>", "<eov>", "<vi_end>", "<vision>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def tokenizers(folder: Path) -> dict[str, Tokenizer]:
    """One of each kind, in which most of Chinese and all emoji are bytes."""
    pieces = [bytes([i]) for i in range(256)] + ["袋".encode(), "袋".encode()[1:] + b"\xe9", b"the", b" \xe9"]
    ranks = "".join(f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(pieces))
    (folder / "tokenizer.model").write_text(ranks)
    train_sentencepiece([TEXTS["English"], TEXTS["Chinese"]] * 30, folder / "pieces.model", 400)
    train_json(folder / "tokenizer.json", SPECIALS)
    return {name: load_tokenizer(folder / name) for name in ("tokenizer.model", "pieces.model", "tokenizer.json")}


KINDS = pytest.mark.parametrize("kind", ["tokenizer.model", "pieces.model", "tokenizer.json"])


@KINDS
@pytest.mark.parametrize("name", TEXTS)
def test_pieces_joined_are_the_text_and_none_ends_in_half_a_character(tokenizers, kind, name):
    tokenizer, text = tokenizers[kind], TEXTS[name].replace("\ufffd", "")
    ids = tokenizer.encode(text)
    ids[len(ids) // 2 : len(ids) // 2] = [tokenizer.vision, tokenizer.vocab_size + 3]  # which have no text
    for size in (1, 3, 1000):
        words = Detokenizer(tokenizer)
        pieces = [words.add(ids[i : i + size]) for i in range(0, len(ids), size)] + [words.finish()]
        assert "".join(pieces) == tokenizer.decode(ids) == text
        assert not any("\ufffd" in piece for piece in pieces)
        assert pieces[-1] == ""  # nothing is kept longer than it must be


@KINDS
@pytest.mark.parametrize("name", TEXTS)
def test_an_answer_that_was_begun_goes_on_with_its_text(tokenizers, kind, name):
    whole = tokenizers[kind]
    tokenizer = dataclasses.replace(whole, _decode=lambda ids: whole.decode(ids).removeprefix(" "))  # as Llama 2's
    text = TEXTS[name].replace("\ufffd", "")
    ids = tokenizer.encode(text)
    for cut in range(1, len(ids)):
        begun = tokenizer.decode(ids[:cut])
        if "\ufffd" in begun:
            continue
        words = Detokenizer(tokenizer)
        words.follow([tokenizer.eot, *ids[:cut]][-16:])
        assert begun + words.add(ids[cut:]) + words.finish() == tokenizer.decode(ids)


@KINDS
def test_bytes_that_are_no_characters_are_as_in_the_whole(tokenizers, kind):
    tokenizer, draw = tokenizers[kind], random.Random(0)
    single = {tokenizer.decode([i]): i for i in range(tokenizer.vocab_size)}
    letters = [single[letter] for letter in "aet"]
    broken = [i for i in range(tokenizer.vocab_size) if "\ufffd" in tokenizer.decode([i])]
    assert len(broken) >= 100
    for _ in range(60):
        ids = [draw.choice(broken if draw.random() < 0.9 else letters) for _ in range(40)]
        words = Detokenizer(tokenizer)
        pieces = [words.add([token]) for token in ids]
        assert "".join([*pieces, words.finish()]) == tokenizer.decode(ids)
        assert len("".join(pieces)) >= len(tokenizer.decode(ids[:-16])) - 1  # garbage does not wait for its end
    words = Detokenizer(tokenizer)
    assert words.add(tokenizer.encode("袋🦘")[:-1]) == "袋" and words.finish() == tokenizer.decode(
        tokenizer.encode("袋🦘")[:-1]
    ).removeprefix("袋")


def _plainly(text: str, stops: tuple[str, ...]) -> str:
    """The text up to the first stop string that is complete, looked for after every character."""
    for end in range(1, len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(found)]
    return text


def _kept_back(text: str, stops: tuple[str, ...]) -> int:
    """Characters at the end of the text that may begin a stop string."""
    return max(n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n]))


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("One. Two.\nUser: 3", ("\nUser:",)),
        ("aaaaab aaab", ("aaab", "b a")),
        ("an answer 袋鼠。END more", ("鼠。END", "END")),
        ("🦘🦘🙂🦘🦘🎥 end", ("🦘🦘🎥", "zzz")),
        ("abcabcabd", ("abcabd",)),
        ("nothing of it", ("nothing of it!", "\ufffd")),
        ("abcd", ("abcd", "bc")),
    ],
)
@KINDS
def test_every_cut_of_a_stop_string_is_held_back(tokenizers, kind, text, stops):
    tokenizer = tokenizers[kind]
    ids, wanted = tokenizer.encode(text), _plainly(text, stops)
    for first, second in itertools.combinations_with_replacement(range(len(ids) + 1), 2):
        words, shown = Detokenizer(tokenizer, stops), ""
        for piece in (ids[:first], ids[first:second], ids[second:]):
            shown += words.add(piece)
            assert wanted.startswith(shown)
        assert words.stopped == (wanted != text)
        assert shown + words.finish() == wanted and words.add(ids) == "" if words.stopped else True
    words, so_far = Detokenizer(tokenizer, stops), ""
    for count, token in enumerate(ids, start=1):  # and no more than may be of one
        so_far += words.add([token])
        read = tokenizer.decode(ids[:count]).rstrip("\ufffd")
        if not words.stopped:
            assert len(so_far) == len(read) - _kept_back(read, stops)


def test_time_is_linear_in_the_answer(tokenizers, monkeypatch):
    tokenizer = tokenizers["tokenizer.model"]
    longest = 0

    def decode(self, ids):
        nonlocal longest
        ids = list(ids)
        longest = max(longest, len(ids))
        return original(self, ids)

    original = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", decode)
    words = Detokenizer(tokenizer, ("<end>",))
    text = "".join(words.add([token]) for token in tokenizer.encode("袋鼠 hop 🦘 \\" * 100) + [0xFF] * 300)
    assert text.startswith("袋鼠 hop 🦘 \\" * 100) and longest <= 32
