"""The tokenizer.json that an export ships splits text as the tokenizer that it was made from."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from kangaroo_jax.config import stage_config
from kangaroo_jax.conversion.tokenizers import from_sentencepiece, write_tokenizer
from kangaroo_jax.data.tokenizer import load_tokenizer

SENTENCES = [
    "What moves in the video, and which way?",
    "  two  spaces\n\nand lines\t!",
    "视频里有什么？一个红色的方块。",
    "Zahlen 1234567890, naïve café, 🙂🙃, \u200d, e\u0301",
    "A red square moves to the left" * 20,
    "<video> <|eot_id|> </s>",
    "aaaaaaaaaaaaaaaaaaaa bbbb",
]


def reader(spec: dict) -> tokenizers.Tokenizer:
    """Without its special tokens, so that text cannot spell them (transformers: split_special_tokens)."""
    plain = [token for token in spec["added_tokens"] if not token["special"]]
    return tokenizers.Tokenizer.from_str(json.dumps({**spec, "added_tokens": plain}))


@pytest.mark.parametrize("text", SENTENCES)
def test_sentencepiece_sentences(tokenizer_file, text):
    ours, theirs = load_tokenizer(tokenizer_file), reader(from_sentencepiece(tokenizer_file))
    assert theirs.encode(text).ids == ours.encode(text)
    assert theirs.decode(ours.encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("text", SENTENCES)
def test_we_read_our_tokenizer_json_as_its_source(tokenizer_file, tmp_path, text):
    """What transformers saves of an export is that file alone."""
    ours = load_tokenizer(tokenizer_file)
    (tmp_path / "tokenizer.json").write_text(json.dumps(from_sentencepiece(tokenizer_file)), encoding="utf-8")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    for piece in (text, f"{text}\n\n{text}", "\n\n", "\n\n\n"):
        assert again.encode(piece) == ours.encode(piece) and again.decode(ours.encode(piece)) == piece
    assert again.vocab_size == ours.vocab_size and again.stop_ids == ours.stop_ids


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]), max_size=60))
def test_sentencepiece_any_text(sentencepiece_pair, text):
    ours, theirs = sentencepiece_pair
    assert theirs.encode(text).ids == ours.encode(text)


@pytest.fixture(scope="module")
def sentencepiece_pair(tokenizer_file):
    return load_tokenizer(tokenizer_file), reader(from_sentencepiece(tokenizer_file))


@pytest.fixture(scope="module")
def llama3(request) -> Path:
    package = pytest.importorskip("llama_models")
    path = Path(package.__file__).parent / "llama3" / "tokenizer.model"
    if not path.is_file():
        pytest.skip("llama-models has no tokenizer.model")
    return path


@pytest.mark.slow
def test_llama3(llama3, tmp_path):
    ours = load_tokenizer(llama3)
    config = stage_config("kangaroo_8b")
    keys = write_tokenizer(llama3, config, tmp_path)
    theirs = reader(json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8")))
    rng = np.random.default_rng(0)
    noise = ["".join(chr(c) for c in rng.integers(32, 0x3000, 40)) for _ in range(300)]
    for text in [*SENTENCES, *noise]:
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)
    again = load_tokenizer(tmp_path / "tokenizer.json")
    names = ("vocab_size", "bos", "eos", "eot", "vi_start", "eof", "eov", "vi_end", "vision")
    assert all(getattr(again, name) == getattr(ours, name) for name in names)
    assert (keys["bos_token_id"], keys["eos_token_id"], keys["header_ids"]) == (
        128000,
        [128001, 128009],
        [128006, 128007],
    )
    assert again.vocab_size == 128_256
    assert (tmp_path / "kangaroo_tokenizer.model").read_bytes() == llama3.read_bytes()


def test_a_tokenizer_larger_than_the_model(tokenizer_file, tmp_path):
    from kangaroo_jax.errors import UserError

    config = stage_config("tiny")
    config.model.llm.vocab_size = 300
    with pytest.raises(UserError, match="310 tokens, but the model knows 300"):
        write_tokenizer(tokenizer_file, config, tmp_path)
