"""Three kinds of tokenizer: against their own reference, exact round trips, specials never read from text."""

import base64
import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kangaroo_jax.data.tokenizer import (
    SENTENCEPIECE_IDS,
    SPECIAL_NAMES,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from kangaroo_jax.data.tokenizer_json import LLAMA3_PATTERN
from kangaroo_jax.errors import UserError

TEXTS = {
    "English": "Kangaroo isn't a marsupial; it's a video model!  It'll watch 12345 frames (3.14%).\n\n\tIndented.",
    "Chinese": "袋鼠是一个长视频模型。它在第7秒看到红色的圆形,然后向左移动。",
    "emoji": "👩‍👩‍👧‍👦 🙂🎥 déjà vu ﬁ — ñandú ༼ つ ◕_◕ ༽つ \u0000 \u2581 \ufffd",
    "code": "def f(x: int) -> str:\n    return {'a': [1, 2, 3]}[\"a\"]  # noqa\n\n\n\tif x >= 10_000:\r\n\t\tpass\n",
    "spaces": "   a    b \n \n  \n c   ",
    "specials": "<|eot_id|><|begin_of_text|> <vi_start><video><image><vision><eof><unk><s> </s> <0x41>",
    "empty": "",
}


def llama_models_folder() -> Path:
    spec = importlib.util.find_spec("llama_models")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llama-models is not installed (pip install --no-deps llama-models)")
    return Path(spec.submodule_search_locations[0]) / "llama3"


@pytest.fixture(scope="module")
def llama3() -> Tokenizer:
    return load_tokenizer(llama_models_folder() / "tokenizer.model")


@pytest.fixture(scope="module")
def piece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = list(TEXTS.values())[:3] * 30 + ["The red circle moves left. 红色的圆形向左移动。 1 2 3 4 5 6 7 8 9 0"] * 30
    return load_tokenizer(train_sentencepiece(texts, tmp_path_factory.mktemp("sp") / "t.model", 420))


# ----------------------------------------------------------------------------------- Llama 3


def test_llama3_ids(llama3: Tokenizer) -> None:
    assert (llama3.kind, llama3.vocab_size) == ("llama3_tiktoken", 128_256)
    assert (llama3.bos, llama3.eos, llama3.eot) == (128_000, 128_001, 128_009)
    assert (llama3.start_header, llama3.end_header) == (128_006, 128_007)
    assert (llama3.vi_start, llama3.eof, llama3.eov, llama3.vi_end) == (128_002, 128_003, 128_004, 128_005)
    ids = [getattr(llama3, role) for role in SPECIAL_NAMES]
    assert len(set(ids)) == len(ids) and max(ids) < llama3.vocab_size
    assert llama3.stop_ids == (128_001, 128_009)


@pytest.mark.parametrize("name", TEXTS)
def test_llama3_equals_the_reference_encoder(llama3: Tokenizer, name: str) -> None:
    llama_models_folder()
    reference = pytest.importorskip("llama_models.llama3.tokenizer").Tokenizer.get_instance()
    ids = llama3.encode(TEXTS[name])
    assert ids == reference.encode(TEXTS[name], bos=False, eos=False)
    assert llama3.decode(ids) == TEXTS[name] == reference.decode(ids)
    roles = {"bos": "bos_id", "eos": "eos_id", "eot": "eot_id"}
    assert all(getattr(llama3, role) == getattr(reference, theirs) for role, theirs in roles.items())
    for role in ("start_header", "end_header"):
        assert getattr(llama3, role) == reference.special_tokens[SPECIAL_NAMES[role]]


def test_llama3_survives_very_long_runs(llama3: Tokenizer) -> None:
    for text in ("a" * 60_000 + " " * 60_000 + "b", "ab " * 150_000):
        assert llama3.decode(llama3.encode(text)) == text


def test_llama3_leaves_specials_out(llama3: Tokenizer) -> None:
    ids = [llama3.bos, *llama3.encode("two"), llama3.vision, *llama3.encode(" words"), llama3.eot]
    assert llama3.decode(ids) == "two words"
    assert llama3.name(llama3.eot) == "<|eot_id|>" and llama3.name(5) is None


@pytest.mark.parametrize(
    "data, words",
    [
        (b"YQ== 0\nYg== x\n", "line 2"),
        (b"YQ== 0\nYg== 7\n", "damaged"),
        (b"YQ== 0\nYg== 1\n", "single bytes"),
        (b"hello", "neither"),
        (b"{}", "not a tokenizer.json"),
        (b"", "neither"),
    ],
)
def test_damaged_files(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(UserError, match=words) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        load_tokenizer(tmp_path / "no.model")
    with pytest.raises(UserError, match="in this folder"):
        load_tokenizer(tmp_path)


# ----------------------------------------------------------------------------- tokenizer.json


def train_json(path: Path, specials: list[str]) -> Path:
    """A byte-level BPE with Llama-3's cut of the text, as its tokenizer.json is built."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(TEXTS.values(), trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    model.add_special_tokens(specials)
    model.save(str(path))
    return path


def test_json_with_named_specials(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train_json(tmp_path / "tokenizer.json", list(SPECIAL_NAMES.values())))
    assert tokenizer.kind == "llama3_json"
    base = tokenizer.vocab_size - len(SPECIAL_NAMES)
    assert [getattr(tokenizer, role) - base for role in SPECIAL_NAMES] == list(range(len(SPECIAL_NAMES)))
    for text in TEXTS.values():
        ids = tokenizer.encode(text)
        assert max(ids, default=0) < base  # no special is read from text
        assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eot]) == text


def test_json_with_reserved_specials(tmp_path: Path) -> None:
    names = [f"<|reserved_special_token_{i}|>" for i in range(256)]
    for place, role in ((0, "bos"), (1, "eos"), (6, "start_header"), (7, "end_header"), (9, "eot")):
        names[place] = SPECIAL_NAMES[role]
    tokenizer = load_tokenizer(train_json(tmp_path / "tokenizer.json", names))
    base = tokenizer.vocab_size - 256
    places = {role: getattr(tokenizer, role) - base for role in SPECIAL_NAMES}
    assert (places["vi_start"], places["eof"], places["eov"], places["vi_end"], places["vision"]) == (2, 3, 4, 5, 11)


def test_json_without_a_chat_template(tmp_path: Path) -> None:
    path = train_json(tmp_path / "tokenizer.json", ["<|begin_of_text|>"])
    with pytest.raises(
        UserError, match="has neither Llama 3's marks nor ChatML's, and no chat template stands beside it"
    ):
        load_tokenizer(path)


def test_json_equals_ranks_of_the_same_model(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    path = train_json(tmp_path / "tokenizer.json", list(SPECIAL_NAMES.values()))
    spec = json.loads(path.read_text())
    printable = _byte_letters()
    vocab = spec["model"]["vocab"]
    assert set(pre_tokenizers.ByteLevel.alphabet()) == set(printable)
    lines = [(rank, bytes(printable[c] for c in token)) for token, rank in vocab.items()]
    ranks = tmp_path / "tokenizer.model"
    ranks.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in sorted(lines)))
    ours, theirs = load_tokenizer(ranks), load_tokenizer(path)
    for text in TEXTS.values():
        assert ours.encode(text) == theirs.encode(text)


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level BPE writes bytes with: printable Latin-1 as itself, the rest from U+0100 on."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(moved)}


# ------------------------------------------------------------------------------ SentencePiece


def test_sentencepiece_ids(piece: Tokenizer) -> None:
    assert (piece.kind, piece.vocab_size) == ("sentencepiece", 420)
    assert {role: getattr(piece, role) for role in SENTENCEPIECE_IDS} == SENTENCEPIECE_IDS
    assert piece.stop_ids == (2, 5)


@pytest.mark.parametrize("name", TEXTS)
def test_sentencepiece_keeps_text(piece: Tokenizer, name: str) -> None:
    ids = piece.encode(TEXTS[name])
    assert piece.decode(ids) == TEXTS[name]
    assert not any(piece.name(i) for i in ids)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_sentencepiece_keeps_any_text(piece: Tokenizer, text: str) -> None:
    ids = piece.encode(text)
    assert piece.decode(ids) == text
    assert all(i >= len(SENTENCEPIECE_IDS) + 1 for i in ids)


def test_ids_beyond_the_tokenizer_have_no_text(piece: Tokenizer) -> None:
    """A model may have more rows than the tokenizer has tokens, and choose one of them."""
    ids = piece.encode("two words")
    assert piece.decode([piece.vocab_size, *ids[:1], 767, -1, *ids[1:]]) == "two words"


def test_sentencepiece_splits_digits(piece: Tokenizer) -> None:
    assert len(piece.encode("12345")) == 5
    assert piece.encode("77")[0] == piece.encode("77")[1]


def test_sentencepiece_keeps_frequent_numbers_whole_on_request(tmp_path: Path) -> None:
    texts = [*TEXTS.values(), "at second 16", "16", "110 seconds"] * 20
    whole = load_tokenizer(train_sentencepiece(texts, tmp_path / "whole.model", 500, split_digits=False))
    assert len(whole.encode("16")) == 1 and whole.decode(whole.encode("16 110 4711")) == "16 110 4711"


def test_sentencepiece_has_one_piece_for_two_newlines(piece: Tokenizer) -> None:
    assert len(piece.encode("\n\n")) == 1 and piece.decode(piece.encode("a\n\nb\n")) == "a\n\nb\n"


def test_sentencepiece_training_is_deterministic(tmp_path: Path) -> None:
    files = [train_sentencepiece(list(TEXTS.values()) * 20, tmp_path / name, 400) for name in ("a.model", "b.model")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_sentencepiece_with_more_characters_than_room(tmp_path: Path) -> None:
    many = "".join(chr(0x4E00 + i) for i in range(500))
    texts = [many, *["the cat and the hat and the bat in the sea"] * 20]
    tokenizer = load_tokenizer(train_sentencepiece(texts, tmp_path / "a.model", 300))
    assert tokenizer.decode(tokenizer.encode(many)) == many


def test_sentencepiece_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too small"):
        train_sentencepiece(["abc"], tmp_path / "a.model", 270)
    with pytest.raises(UserError, match="give more text"):
        train_sentencepiece(["abc"], tmp_path / "a.model", 2000)
    assert not list(tmp_path.iterdir())


def test_sentencepiece_of_others_is_refused(tmp_path: Path) -> None:
    import sentencepiece

    lines = tmp_path / "lines.txt"
    lines.write_text("the cat sat on the mat\n" * 50)
    sentencepiece.SentencePieceTrainer.Train(
        input=str(lines), model_prefix=str(tmp_path / "other"), vocab_size=30, model_type="bpe", minloglevel=2
    )
    with pytest.raises(UserError, match="train_sentencepiece"):
        load_tokenizer(tmp_path / "other.model")


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("kind", ["llama3", "json", "piece"])
def test_bytes_of_tokens_joined_are_those_of_the_text(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, name: str
) -> None:
    if kind == "json":
        tokenizer = load_tokenizer(train_json(tmp_path / "tokenizer.json", list(SPECIAL_NAMES.values())))
    else:
        tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(TEXTS[name])
    assert b"".join(map(tokenizer.bytes_of, [tokenizer.vision, *ids, tokenizer.eot, 10**6])) == TEXTS[name].encode()


def test_lone_surrogates_do_not_stop_anything(piece: Tokenizer) -> None:
    assert piece.decode(piece.encode("a\ud800b")) == "a?b"
