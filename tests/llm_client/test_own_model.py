"""Our own model as a captioner in this process: a checkpoint of random weights that is loaded and asked."""

import asyncio
import contextlib
import json
import time
from pathlib import Path

import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from PIL import Image

from kangaroo_jax.checkpoints.reading import keep_tokenizer
from kangaroo_jax.config import ModelConfig
from kangaroo_jax.curation.annotate.config import annotation_config
from kangaroo_jax.curation.annotate.run import annotate_clips
from kangaroo_jax.data.tokenizer import train_sentencepiece
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.chat import Kangaroo
from kangaroo_jax.llm_client import own_model
from kangaroo_jax.llm_client.own_model import OwnModel
from kangaroo_jax.llm_client.requests import Completion, Failure, Request
from kangaroo_jax.llm_client.schemas import object_schema
from kangaroo_jax.models.parameters import abstract_model
from kangaroo_jax.training.checkpoint import Checkpoints
from kangaroo_jax.training.step import TrainState

WORDS = ["A red square moves to the left.", "This frame was taken seconds into a video.", "一个红色的方块。"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_micro_config, make_random_model) -> Path:
    """What training would have written: a stage's folder, with its tokenizer."""
    folder = tmp_path_factory.mktemp("own") / "stage5_long_video"
    config = make_micro_config()
    config.model.llm.vocab_size = 300
    params = abstract_model(ModelConfig.from_config(config.model)).flatten(make_random_model(config.model))
    state = TrainState(jnp.int32(7), params, {}, {})
    checkpoints = Checkpoints(folder, state)
    checkpoints.save(state, b"{}", config.to_dict())
    checkpoints.close()
    train_sentencepiece(WORDS, folder.parent / "tokenizer.model", vocab_size=300)
    keep_tokenizer(folder.parent / "tokenizer.model", folder)
    return folder


def test_it_captions_frames_in_batches_as_chat_does(tmp_path, checkpoint, honest_server, make_clips):
    source = make_clips(tmp_path / "in", 2, frames=2)
    for number, path in enumerate(sorted((tmp_path / "in/frames").iterdir())):
        Image.fromarray(np.full((16, 16, 3), (60 * number, 90, 200), np.uint8)).save(path)
    config = annotation_config("own")
    config.update(languages=("en",), frame_tokens=12)
    config.refine.min_frames = 0.0  # a random model never ends: its captions are cut
    config.backends.captioner_a.update(checkpoint=str(checkpoint), batch_size=4)
    config.backends.writer.update(base_url=honest_server, model="writer")
    with contextlib.suppress(UserError):  # where no caption is ok, which is this model's to decide
        annotate_clips(source, tmp_path / "out", config, tell=lambda line: None)
    rows = [json.loads(line) for line in (tmp_path / "out/captions.jsonl").read_text().splitlines()]
    kangaroo = Kangaroo.load(checkpoint)
    for row in rows:
        assert row["models"]["captioner_a"].startswith("kangaroo:checkpoints/7@")
        for frame in row["frames"]:
            (said,) = frame["captions"]
            assert said["outcome"] in ("ok", "truncated") or said["reason"] == "malformed: empty answer"
            seconds = frame["time"]
            query = (Path(annotate_clips.__code__.co_filename).parent / "prompts/frame_caption.en.txt").read_text()
            _, _, body = query.partition("\n")
            system, text = (part.strip() for part in body.split("\n---\n"))
            asked = f"{system}\n\n{text}".replace("{time}", f"{seconds:.1f}")
            path = str(tmp_path / "out" / frame["path"])
            assert kangaroo.chat(image=path, query=asked, max_new_tokens=12)[0] == said["text"]
    summary = json.loads((tmp_path / "out/annotation.json").read_text())
    assert summary["this_run"]["captioner_a"]["calls"] == 4


def test_a_bad_image_costs_its_own_request_alone(tmp_path, checkpoint):
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no image")
    backend = OwnModel("own", str(checkpoint), batch_size=3, settings={})

    async def ask() -> list:
        paths = [str(tmp_path / name) for name in ("good.png", "bad.png", "good.png", "bad.png", "good.png")]
        asked = [Request("v1", f"What is it, {i}?", images=(path,)) for i, path in enumerate(paths)]
        return await asyncio.gather(*(backend.complete(one, (), 4, 0) for one in asked), return_exceptions=True)

    answers = asyncio.run(ask())
    for answer in answers[1::2]:
        assert isinstance(answer, Failure) and answer.kind == "input" and "bad.png" in str(answer)
    assert all(isinstance(a, Completion) and 0 < a.completion_tokens <= 4 < a.prompt_tokens for a in answers[::2])


def test_an_answer_has_the_form_of_its_schema(checkpoint):
    pytest.importorskip("llguidance")
    schema = object_schema(answer={"enum": ["left", "right"]}, sure={"type": "boolean"})
    request = Request("v1", "Which way?", schema=schema)

    async def ask(**options: bool) -> list[Completion]:
        settings = {"temperature": 1.5}
        backend = OwnModel("own", str(checkpoint), settings=settings, **options)
        return await asyncio.gather(*(backend.complete(request, (), 40, attempt) for attempt in range(3)))

    for completion in asyncio.run(ask()):
        jsonschema.validate(json.loads(completion.text), schema)
    with pytest.raises(ValueError):
        json.loads(asyncio.run(ask(structured=False))[0].text)


def test_who_stops_waiting_cancels_the_answer(checkpoint):
    backend = OwnModel("own", str(checkpoint), settings={})

    async def ask() -> None:
        long = asyncio.create_task(backend.complete(Request("v1", "What?"), (), 100_000, 0))
        while not (own_model._load(backend._path).stats()["running"]):
            await asyncio.sleep(0.01)
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long

    asyncio.run(ask())
    engine = own_model._load(backend._path).engine
    deadline = time.monotonic() + 30
    while not engine.stats().get("requests_cancelled") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.stats()["requests_cancelled"] == 1


def test_no_checkpoint_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint folder"):
        OwnModel("own", str(tmp_path / "none"), settings={})
