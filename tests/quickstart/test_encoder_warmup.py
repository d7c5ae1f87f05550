"""An encoder learns words before stage 1: its tokens become the decoder's embeddings of what a picture shows."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.config import StageConfig
from kangaroo_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from kangaroo_jax.models.parameters import Binding, abstract_model
from kangaroo_jax.quickstart import encoder_warmup
from kangaroo_jax.system.progress import silent

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (30, 30, 230), "white": (240, 240, 240)}
SIZES = {"large": 2, "small": 6}


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Forty pictures of one square each, and their captions."""
    rng, lines = np.random.default_rng(0), []
    for i in range(40):
        colour, size = list(COLOURS)[i % 4], list(SIZES)[i // 4 % 2]
        pixels = rng.integers(0, 40, (16, 16, 3)).astype(np.uint8)
        edge = SIZES[size]
        pixels[edge : 16 - edge, edge : 16 - edge] = COLOURS[colour]
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        said = [
            {"from": "human", "value": "<image>\nDescribe it."},
            {"from": "gpt", "value": f"A {size}, {colour} one."},
        ]
        lines.append(json.dumps({"id": str(i), "image": f"{i}.png", "conversations": said}) + "\n")
    (tmp_path / "captions.jsonl").write_text("".join(lines))
    return tmp_path


@pytest.fixture
def config(corpus, micro_config, make_random_model) -> StageConfig:
    """A stage that starts from random weights; a picture of 16 pixels has four patches, so four tokens."""
    words = [f"user assistant Describe it. A {size}, {colour} one." for size in SIZES for colour in COLOURS]
    micro_config.model.patchify.enabled = False
    with ocp.StandardCheckpointer() as writer:
        model = make_random_model(micro_config.model)
        writer.save(corpus / "start" / "params", Binding(model).flatten(model))
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(corpus / "start" / "config", args=ocp.args.JsonSave(micro_config.to_dict()))
    train_sentencepiece(words, corpus / "start" / "tokenizer.model", vocab_size=300)
    micro_config.init_from = str(corpus / "start")
    return StageConfig.from_config(micro_config)


def test_a_picture_becomes_its_words(corpus, config, monkeypatch):
    monkeypatch.setattr(encoder_warmup, "PICTURES", 24)
    monkeypatch.setattr(encoder_warmup, "LEARNING_RATE", 5e-3)
    target, lines = corpus / "encoder", []
    found = encoder_warmup.warm_up(config, corpus / "captions.jsonl", target, 200, lines.append)
    assert found == {"steps": 200, "pictures": 40, "words_right": 1.0}
    assert any("100%" in line for line in lines)

    binding = abstract_model(config.model)
    before, after = (reading.load_params(path, binding) for path in (config.init_from, target))
    changed = {path.split("/")[0] for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {"vision", "projector"}
    tokenizer = load_tokenizer(target)
    table = np.asarray(after["llm/embedding"])
    pixels = np.asarray(Image.open(corpus / "5.png"))  # a small green one, as any frame of a video
    tokens = binding.bind(after).encode(jnp.asarray(pixels)[None, None], jnp.asarray([[37.5]]))[0]
    rows = encoder_warmup.embeddings(["small", "green", "one", "large", "red", "blue", "white"], tokenizer, table)
    distance = np.square(np.asarray(tokens)[:, None] - rows).sum(-1)
    assert distance.argmin(-1).tolist() == [0, 1, 2, 0]

    again = encoder_warmup.warm_up(config, Path("nowhere"), target, 200, silent)  # what is there is not made again
    assert again == found


def test_words_have_no_articles_and_a_space_alone_is_none(corpus, config):
    assert encoder_warmup.words_of("Two purple 7s, at the bottom.") == ["two", "purple", "7s", "at", "bottom"]
    tokenizer = load_tokenizer(Path(config.init_from))
    table = np.arange(400 * 2, dtype=np.float32).reshape(400, 2)
    tokens = [token for token in tokenizer.encode(" xq") if tokenizer.decode([token]).strip()]
    assert len(tokens) == 2  # letters that the tokenizer's text did not have together
    np.testing.assert_allclose(encoder_warmup.embeddings(["xq"], tokenizer, table)[0], table[tokens].mean(0))


def test_the_loss_is_that_of_the_formula():
    rng = np.random.default_rng(0)
    tokens, table = rng.standard_normal((3, 2, 5)), rng.standard_normal((4, 5))
    wanted = rng.integers(0, 4, (3, 2))
    size = (table**2).sum(-1).mean()
    near = -encoder_warmup.SHARPNESS * ((tokens[:, :, None] - table) ** 2).sum(-1) / 2 / size
    right = np.take_along_axis(near, wanted[..., None], -1)[..., 0]
    expected = (np.log(np.exp(near).sum(-1)) - right).mean() - (right / encoder_warmup.SHARPNESS).mean()
    ours = encoder_warmup.loss_of(*map(jnp.asarray, (tokens, table, wanted)))
    np.testing.assert_allclose(float(ours), expected, rtol=1e-5)
