"""What was seen and read is not seen and read again, and never taken for something else."""

import gc
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from PIL import Image

from kangaroo_jax.config import StageConfig
from kangaroo_jax.data.annotations.conversation import Conversation, Media, Turn
from kangaroo_jax.data.media.video import load_video
from kangaroo_jax.data.tokenizer import load_tokenizer
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.chat import Kangaroo
from kangaroo_jax.inference.history import ask
from kangaroo_jax.inference.sampling import Sampling
from tests.inference.conftest import write_video

SHORT = dict(max_new_tokens=6)


@pytest.fixture
def compiled():
    """The number of programs that have been compiled since, by JAX's own account."""
    found: list[str] = []

    def heard(event: str, *_: object, **__: object) -> None:
        if "backend_compile" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)
    yield found
    jax.monitoring.unregister_event_duration_listener(heard)


@pytest.fixture(scope="module")
def warm(make_micro_config, media, random_model):
    """A model whose programs are all compiled."""
    config = make_micro_config()
    config.model.llm.vocab_size = 300
    with Kangaroo(random_model, StageConfig.from_config(config), load_tokenizer(media / "tokenizer.model")) as kangaroo:
        assert kangaroo.warm_up() == kangaroo.stats()["programs_compiled"]
        yield kangaroo


def test_a_second_round_reads_what_is_new_and_another_name_changes_nothing(warm, media, compiled, tmp_path):
    first, history = warm.chat(video=media / "b.mp4", query="What moves?", **SHORT)
    assert first.usage.frames_decoded == first.usage.frames_encoded == 6 and first.usage.cached_tokens == 0
    before = warm.stats()
    second, longer = warm.chat(query="Which way, and how fast?", history=json.loads(json.dumps(history)), **SHORT)
    after, usage = warm.stats(), second.usage
    assert usage.frames_decoded == usage.frames_encoded == 0 and usage.frames_reused == 6
    new = usage.prompt_tokens - first.usage.prompt_tokens
    assert usage.prompt_tokens - usage.cached_tokens <= new + 1
    assert after["tokens_prefilled"] - before["tokens_prefilled"] <= new + 127
    other = shutil.copy(media / "b.mp4", tmp_path / "another name")
    third, _ = warm.chat(video=other, query="Is it red?", **SHORT)
    assert third.usage.frames_decoded == third.usage.frames_encoded == 0 and third.usage.cached_tokens > 0
    assert compiled == [] and len(longer) == 4
    assert first.finish_reason in ("stop", "length") and usage.completion_tokens == len(second.ids)


def test_a_video_that_was_watched_at_upload_is_known_at_the_first_question(kangaroo, media):
    usage = kangaroo.warm(media / "b.mp4")
    assert usage.frames_encoded == 6
    answer, _ = kangaroo.chat(video=media / "b.mp4", query="What moves?", **SHORT)
    assert answer.usage.frames_encoded == 0 and answer.usage.cached_tokens >= usage.prompt_tokens - 1


def test_media_may_be_given_in_every_form(kangaroo, media):
    data = (media / "a.mp4").read_bytes()
    said, _ = kangaroo.chat(video=media / "a.mp4", query="What?", **SHORT)
    for options in (
        {"video": data},
        {"video_path": str(media / "a.mp4"), "tokenizer": object(), "do_sample": False, "temperature": 0.6},
        {"media": [("video", data)]},
        {"video": media / "a.mp4", "eos_token_id": list(kangaroo.tokenizer.stop_ids)},
    ):
        answer, _ = kangaroo.chat(query="What?", **options, **SHORT)
        assert answer == said and answer.usage.frames_reused == 4, options
    clip = load_video(media / "a.mp4", image_size=16, times=[0.25, 0.75, 1.75, 2.75])
    shown, history = kangaroo.chat(frames=clip.pixels, times=clip.times, query="What?", **SHORT)
    assert shown.usage.frame_times == (tuple(clip.times.astype(np.float32).tolist()),)
    listed, _ = kangaroo.chat(
        frames=[Image.fromarray(f) for f in clip.pixels], times=clip.times, query="What?", **SHORT
    )
    assert listed == shown and listed.usage.frames_encoded == 0
    assert kangaroo.chat(query="And?", history=json.loads(json.dumps(history)), **SHORT)[0].usage.frames_reused == 4

    picture = np.asarray(Image.open(media / "c.jpg"))
    said, _ = kangaroo.chat(image=media / "c.jpg", query="What?", **SHORT)
    for thing in (picture, Image.fromarray(picture), (media / "c.jpg").read_bytes()):
        assert kangaroo.chat(image=thing, query="What?", **SHORT)[0] == said
    turned = Image.fromarray(picture)
    turned.getexif()[0x0112] = 3
    two, _ = kangaroo.chat(query="<image> or <image>?", media=[("image", picture), ("image", turned)], **SHORT)
    assert two.usage.frames_reused + two.usage.frames_encoded == 4
    several = [("video", media / "a.mp4"), ("image", picture), ("video", media / "b.mp4")]
    _, history = kangaroo.chat(query="Which?", media=several, **SHORT)
    assert [medium["kind"] for medium in history[0]["media"]] == ["video", "image", "video"]


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("pixels are uint8", {"image": np.zeros((4, 4, 3))}),
        ("cannot be given as int", {"video": 7}),
        ("2 frames have as many seconds", {"frames": np.zeros((2, 8, 8, 3), np.uint8), "times": [1.0]}),
        ("from 0 on and ascending", {"frames": np.zeros((2, 8, 8, 3), np.uint8), "times": [1.0, 0.5]}),
        ("times are those of frames", {"times": [1.0]}),
        ("give pairs of 'video' or 'image'", {"media": [("sound", "a.wav")]}),
        ("chat has no argument 'colour'", {"colour": 1}),
        ("top_k", {"top_k": -1}),
    ],
)
def test_what_cannot_be_given_is_one_line(kangaroo, words, options):
    with pytest.raises(UserError, match=words) as error:
        kangaroo.chat(query="?", **options)
    assert "\n" not in str(error.value)


def test_a_stream_may_be_left(kangaroo, media):
    whole, _ = kangaroo.chat(video=media / "a.mp4", query="What?", temperature=2.0, max_new_tokens=40)
    stream = kangaroo.chat(video=media / "a.mp4", query="What?", temperature=2.0, max_new_tokens=40, stream=True)
    assert "".join(stream).strip() == whole == stream.reply and stream.history[-1]["text"] == whole
    left = kangaroo.stream([ask("Go on", video=media / "a.mp4")], Sampling(temperature=2.0), max_new_tokens=400)
    for _ in left:
        break
    assert left.reply.finish_reason == "cancelled" and len(left.reply.ids) < 400
    assert kangaroo.chat(query="Who?", **SHORT)[0] is not None


def test_n_answers_and_scores_of_given_ones(kangaroo, media):
    asked = Conversation("0", (Turn("user", "<video>\nWhat?"),), (Media("video", str(media / "a.mp4")),))
    (replies,) = kangaroo.generate([asked], n=3, max_new_tokens=12, sampling=Sampling(temperature=3.0, seed=5))
    assert len(set(replies)) == 3
    (again,) = kangaroo.generate([asked], max_new_tokens=12, sampling=Sampling(temperature=3.0, seed=6))
    assert again == [replies[1]]
    (greedy,), text = kangaroo.generate([asked], max_new_tokens=4), "It moves."
    scores = kangaroo.score([asked, asked], [text, "No."])
    assert [len(s) for s in scores] == [len(kangaroo.tokenizer.encode(t)) for t in (text, "No.")]
    assert all((s < 0).all() for s in scores)
    chosen, _ = kangaroo.chat(video=media / "a.mp4", query="What?", max_new_tokens=4, logprobs=0)
    assert chosen == greedy[0] and len(chosen.logprobs) == len(chosen.ids)
    with pytest.raises(UserError, match="the continuation to score is empty"):
        kangaroo.score([asked], [""])


@pytest.mark.parametrize("rounds", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_never_the_answer_to_another_video(warm, media, tmp_path, rounds):
    """Two videos of equal length and text, one of them also with half of its frames, at sixteen at a time."""
    for name, level in (("dark", 10), ("light", 200)):
        write_video(tmp_path / f"{name}.mp4", 6, level)
    asked = [
        Conversation(name, (Turn("user", "<video>\nWhat is it?"),), (Media("video", str(path), **options),))
        for name, path, options in (
            ("dark", tmp_path / "dark.mp4", {}),
            ("light", tmp_path / "light.mp4", {}),
            ("half", tmp_path / "light.mp4", {"nframes": 4}),
        )
    ]
    alone = [warm.answer_many([one], max_new_tokens=8)[0] for one in asked]
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: warm.answer_many([asked[i % 3]], max_new_tokens=8)[0], range(rounds * 3)))
    assert answers == alone * rounds
    write_video(tmp_path / "light.mp4", 6, 10)  # in place: it is the dark one now
    assert warm.answer_many([asked[1]], max_new_tokens=8) == [alone[0]]


def test_a_model_that_nobody_refers_to_ends_its_threads(make_micro_config, media, random_model):
    config = make_micro_config()
    config.model.llm.vocab_size = 300
    kangaroo = Kangaroo(random_model, StageConfig.from_config(config), load_tokenizer(media / "tokenizer.model"))
    kangaroo.chat(video=media / "a.mp4", query="What?", **SHORT)
    thread = kangaroo.engine._thread
    assert thread.is_alive()
    del kangaroo
    gc.collect()
    assert not thread.is_alive()
