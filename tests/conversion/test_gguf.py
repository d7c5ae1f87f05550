"""Decoders in GGUF files: as transformers reads them, with their tokenizer and template; what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.checkpoints.stored import whole
from kangaroo_jax.conversion.convert import convert
from kangaroo_jax.conversion.sources import open_source
from kangaroo_jax.data.batches.sample import render_parts
from kangaroo_jax.data.tokenizer import load_tokenizer
from kangaroo_jax.errors import UserError
from tests.data.test_chat_format import KINDS
from tests.data.test_tokenizer import TEXTS, train_json

gguf = pytest.importorskip("gguf")
WIDTH, DEPTH, HEADS, KV, MLP = 256, 2, 4, 2, 512  # K quants need rows of 256
KINDS_OF_NUMBERS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K"]
HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where a block has numbers of 16 bits


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory) -> dict:
    """Of ChatML's kind, cut as SmolLM2's is."""
    folder = tmp_path_factory.mktemp("json")
    spec = json.loads(train_json(folder / "tokenizer.json", KINDS["smol"][1]).read_text())
    cuts = [{"type": "Digits", "individual_digits": True}]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*cuts, level]}
    spec["model"]["ignore_merges"] = False
    return spec


def random_blocks(rng, rows: int, columns: int, kind) -> np.ndarray:
    """Quantised rows of which only the scales are chosen."""
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * columns // size, nbytes)).astype(np.uint8)
    for place in HALVES[kind.name]:
        halves = rng.uniform(1e-4, 2e-3, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def write(path: Path, spec: dict, kind: str = "F32", *, arch: str = "llama", tied: bool = True, **changes) -> Path:
    """A random decoder as llama.cpp writes one."""
    rng, writer = np.random.default_rng(0), gguf.GGUFWriter(path, arch)
    writer.add_block_count(DEPTH)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_rope_freq_base(50_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    vocab = dict(spec["model"]["vocab"]) | {e["content"]: e["id"] for e in spec["added_tokens"]}
    names = sorted(vocab, key=vocab.__getitem__)
    writer.add_vocab_size(len(names))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(names)
    writer.add_token_types([3 if name in KINDS["smol"][1] else 1 for name in names])
    writer.add_token_merges([" ".join(merge) for merge in spec["model"]["merges"]])
    writer.add_bos_token_id(vocab["<|im_start|>"])
    writer.add_eos_token_id(vocab["<|im_end|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(KINDS["smol"][0])
    if "window" in changes:
        writer.add_sliding_window(changes["window"])
    shapes = {"token_embd": (len(names), WIDTH), "output_norm": (WIDTH,)} | (
        {} if tied else {"output": (len(names), WIDTH)}
    )
    for i in range(DEPTH):
        shapes |= {f"blk.{i}.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.attn_q": (WIDTH, WIDTH), f"blk.{i}.attn_output": (WIDTH, WIDTH)}
        shapes |= {f"blk.{i}.attn_{name}": (WIDTH * KV // HEADS, WIDTH) for name in "kv"}
        shapes |= {f"blk.{i}.ffn_{name}": (MLP, WIDTH) for name in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down": (WIDTH, MLP)}
    for name, shape in shapes.items():
        values = (rng.standard_normal(shape) * 0.1).astype(np.float32)
        quant = gguf.GGMLQuantizationType[kind if len(shape) > 1 and name != "token_embd" else "F32"]
        if quant.name in HALVES:
            writer.add_tensor(f"{name}.weight", random_blocks(rng, *shape, quant), raw_dtype=quant)
        elif quant.name == "F16":
            writer.add_tensor(f"{name}.weight", values.astype(np.float16))
        elif quant.name == "F32":
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, quant), raw_dtype=quant)
    if "bias" in changes:
        writer.add_tensor("blk.0.attn_q.bias", np.zeros(WIDTH, np.float32))
    if "factors" in changes:
        writer.add_tensor("rope_freqs.weight", changes["factors"].astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", KINDS_OF_NUMBERS)
def test_every_number_is_that_of_transformers(tmp_path, tokenizer_json, kind):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) < 5 and kind in HALVES:
        pytest.skip("its own reader is compared with once")
    write(tmp_path / "m.gguf", tokenizer_json, kind, tied=False)
    convert([tmp_path / "m.gguf"], tmp_path / "hf", format="llama", tell=lambda line: None)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ours = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert ours.config.rope_parameters["rope_theta"] == theirs.config.rope_parameters["rope_theta"] == 50_000
    assert ours.config.num_key_value_heads == KV and ours.config.rms_norm_eps == 1e-5


def test_its_tokenizer_and_template(tmp_path, tokenizer_json):
    write(tmp_path / "m.gguf", tokenizer_json)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json))
    (tmp_path / "chat_template.jinja").write_text(KINDS["smol"][0])
    read, given = load_tokenizer(tmp_path / "m.gguf"), load_tokenizer(tmp_path / "tokenizer.json")
    for text in TEXTS.values():
        assert read.encode(text) == given.encode(text) and read.decode(read.encode(text)) == text
    assert read.stop_ids == given.stop_ids == (402,)
    turns = [("user", ["1 + 23?"]), ("assistant", ["24"]), ("user", ["Sure?"])]
    assert render_parts(turns, read, 1, 1).tokens.tolist() == render_parts(turns, given, 1, 1).tokens.tolist()


@pytest.fixture(scope="module")
def assembled(tmp_path_factory, tokenizer_json) -> Path:
    """A model of a decoder alone, with a new encoder."""
    folder = tmp_path_factory.mktemp("assembled")
    write(folder / "m.gguf", tokenizer_json)
    return convert([folder / "m.gguf"], folder / "ours", preset="tiny", parts_alone=True, tell=lambda line: None)


def test_a_decoder_alone_makes_a_model_with_rows_for_the_marks(assembled):
    config = reading.load_stage(assembled)
    llm, tokenizer = config.model.llm, load_tokenizer(reading.find_tokenizer(assembled))
    assert llm.tied_head and (llm.vocab_size, llm.added_rows) == (512, 512 - 403)  # a multiple of 128
    assert all(getattr(tokenizer, name) == token for name, token in config.model.special_ids.flat())
    assert tokenizer.settings is not None and tokenizer.vocab_size == 408
    source = open_source(assembled)
    table = source.weights.read("llm/embedding", whole((512, WIDTH)))
    np.testing.assert_allclose(table[403:], np.broadcast_to(table[:403].mean(0), (109, WIDTH)), atol=1e-6)
    vision = source.weights.read("vision/norm/scale", whole(source.weights.specs["vision/norm/scale"].shape))
    assert (vision == 1).all()


def test_the_decoder_comes_back_without_the_rows(assembled, tmp_path, tokenizer_json):
    """And the whole model comes back from an export as it was, whose tokenizer has the marks."""
    lines: list[str] = []
    convert([assembled], tmp_path / "llama", format="llama", tell=lines.append)
    assert "109 rows of the vocabulary that were added for the marks: left out" in lines
    first, again = (open_source(path).weights for path in (assembled.parent / "m.gguf", tmp_path / "llama"))
    for path, spec in first.specs.items():
        np.testing.assert_array_equal(first.read(path, whole(spec.shape)), again.read(path, whole(spec.shape)))
    assert len(json.loads((tmp_path / "llama/tokenizer.json").read_text())["added_tokens"]) == 3
    convert([assembled], tmp_path / "hf", tell=lambda line: None)
    added = json.loads((tmp_path / "hf/tokenizer.json").read_text())["added_tokens"]
    assert [(e["id"], e["content"]) for e in added[-5:]] == list(
        zip(range(403, 408), ("<vi_start>", "<eof>", "<eov>", "<vi_end>", "<vision>"), strict=True)
    )
    convert([tmp_path / "hf"], tmp_path / "ours", tell=lambda line: None)
    assert reading.load_config(tmp_path / "ours").to_dict() == reading.load_config(assembled).to_dict()
    one, other = (open_source(path).weights for path in (assembled, tmp_path / "ours"))
    for path, spec in one.specs.items():
        a, b = one.read(path, whole(spec.shape)), other.read(path, whole(spec.shape))
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), path
    kept, back = (load_tokenizer(reading.find_tokenizer(folder)) for folder in (assembled, tmp_path / "ours"))
    assert kept.settings is not None and back.settings is not None
    assert (kept.settings.template, kept.stop_ids, kept.vocab_size) == (back.settings.template, (402,), back.vocab_size)


def test_an_export_answers_alike(assembled, tmp_path, video):
    """Verified as users do: the same tokens of a prompt with a video, the same logits, the same answers."""
    pytest.importorskip("transformers")
    from kangaroo_jax.conversion.verify import verify

    convert([assembled], tmp_path / "hf", tell=lambda line: None)
    report = verify(assembled, tmp_path / "hf", media=video, tell=lambda line: None)
    assert report.agrees and report.vision_tokens > 0 and report.greedy == 32


def test_a_file_is_compared_with_the_model_made_of_it(assembled):
    pytest.importorskip("transformers")
    from kangaroo_jax.conversion.verify import verify_all

    lines: list[str] = []
    (report,) = verify_all([assembled.parent / "m.gguf"], assembled, preset="tiny", tell=lines.append)
    assert report.agrees and "transformers' LlamaForCausalLM" in lines[0]


def test_llama_31s_scaling_is_found_in_its_divisors(tmp_path, tokenizer_json):
    from kangaroo_jax.config import RopeScaling
    from kangaroo_jax.models.layers import NOT_SCALED, rotary_frequencies

    half = [rotary_frequencies(64, 50_000.0, scaling) for scaling in (NOT_SCALED, RopeScaling(factor=32.0))]
    write(tmp_path / "m.gguf", tokenizer_json, factors=half[0] / half[1])
    scaling = open_source(tmp_path / "m.gguf").config.model.llm.rope_scaling
    assert scaling.to_dict() == dict(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
    write(tmp_path / "n.gguf", tokenizer_json, factors=np.linspace(1, 4, 32))
    with pytest.raises(UserError, match="rope_freqs.weight is not the rope scaling of Llama 3.1"):
        open_source(tmp_path / "n.gguf")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arch": "qwen2"}, "model_type 'qwen2' is no Llama: it has biases"),
        ({"arch": "gemma2"}, "model_type 'gemma2' is no Llama"),
        ({"window": 128}, "has a sliding window, which the decoder, a Llama, does not have"),
        ({"bias": True}, "has biases, which the decoder"),
        ({"pre": "chatglm-bpe"}, "cuts text as 'chatglm-bpe', which is not read"),
        ({"kind": "Q5_0", "cut": True}, "cut short"),
    ],
)
def test_what_is_refused_is_one_line_and_leaves_nothing(tmp_path, tokenizer_json, options, words):
    options = dict(options)
    cut = options.pop("cut", False)
    file = write(tmp_path / "m.gguf", tokenizer_json, **options)
    if cut:
        file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(UserError, match=words) as error:
        convert([file], tmp_path / "out", preset="tiny", parts_alone=True, tell=lambda line: None)
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("size", [3, 4, 20, 500, 3000])
def test_a_cut_header_is_one_line(tmp_path, tokenizer_json, size):
    whole_file = write(tmp_path / "w", tokenizer_json).read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole_file[:size])
    with pytest.raises(UserError, match="m.gguf: (damaged|weights are read from)"):
        open_source(tmp_path / "m.gguf")
