"""Recipes: the template to the token, the arithmetic of the paper's stages, what is learnt, what is cut."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kangaroo_jax.config import DataConfig
from kangaroo_jax.data.annotations.conversation import Conversation, Media, Turn
from kangaroo_jax.data.annotations.formats import parse_record
from kangaroo_jax.data.batches.sample import make_recipe, plan_media, render_parts, render_prompt, video_block_length
from kangaroo_jax.data.media.video import FramePolicy, MediaInfo, MediaRef
from kangaroo_jax.data.tokenizer import Tokenizer
from kangaroo_jax.errors import UserError
from tests.data.media import write_video

K, V = 2, 3  # frames a group, tokens a group


def chat(*texts: str, media: tuple[Media, ...] = (), system: str = "") -> Conversation:
    turns = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return Conversation("s", tuple([Turn("system", system)] * bool(system) + turns), media)


def spell(t: Tokenizer, *parts: str | int | list[int]) -> list[int]:
    """Ids of parts: `[h:role]` a header, names of special tokens by id, lists as they are, the rest as text."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, list):
            ids += part
        elif isinstance(part, int):
            ids.append(part)
        elif part.startswith("[h:"):
            ids += [t.start_header, *t.encode(part[3:-1]), t.end_header, *t.encode("\n\n")]
        else:
            ids += t.encode(part)
    return ids


def test_template_is_exact(tokenizer: Tokenizer, data_config: DataConfig, media: Path) -> None:
    t = tokenizer
    video = Media("video", str(media / "2s.mp4"))
    photo = Media("image", str(media / "photo.jpg"))
    conversation = chat(
        " <video>\nWhat moves?\n", "The circle. ", "And <image> here?", "红色", media=(video, photo), system="Be brief."
    )
    recipe = make_recipe(conversation, t, data_config, K, V)
    v = [t.vision] * V
    film = [t.vi_start, *v, t.eof, *v, t.eov, t.vi_end]  # 4 frames, 2 groups
    picture = [t.vi_start, *v, t.eov, t.vi_end]  # 1 frame, repeated
    expected = [
        (spell(t, t.bos, "[h:system]", "Be brief.", t.eot, "[h:user]", film, "\nWhat moves?", t.eot), 0),
        (spell(t, "[h:assistant]"), 0),
        (spell(t, "The circle.", t.eot), 1),
        (spell(t, "[h:user]", "And ", picture, " here?", t.eot, "[h:assistant]"), 0),
        (spell(t, "红色", t.eot), 1),
    ]
    assert recipe.tokens.tolist() == [i for ids, _ in expected for i in ids]
    assert recipe.weights.tolist() == [float(w) for ids, w in expected for _ in ids]
    np.testing.assert_array_equal(recipe.is_vision, recipe.tokens == t.vision)
    assert recipe.frames == 6 and [ref.times for ref in recipe.media] == [(0.25, 0.75, 1.25, 1.75), (0.0, 0.0)]


def test_tags_and_specials_in_text_are_only_text(tokenizer: Tokenizer, data_config: DataConfig) -> None:
    words = "say <vision><|eot_id|>"
    recipe = make_recipe(chat(words, "a <video> tag <eov>"), tokenizer, data_config, K, V)
    t = tokenizer
    assert recipe.tokens.tolist() == spell(
        t, t.bos, "[h:user]", words, t.eot, "[h:assistant]", "a <video> tag <eov>", t.eot
    )
    assert not recipe.is_vision.any() and recipe.media == ()


def test_caption_loss_drops_the_users_words(tokenizer: Tokenizer, data_config: DataConfig, media: Path) -> None:
    t = tokenizer
    data_config = replace(data_config, loss_on="caption")
    conversation = chat("<image>\nDescribe this.", "A red circle.", media=(Media("image", str(media / "photo.jpg")),))
    recipe = make_recipe(conversation, t, data_config, 1, V)
    picture = [t.vi_start, *[t.vision] * V, t.eov, t.vi_end]
    prompt = spell(t, t.bos, "[h:user]", picture, t.eot, "[h:assistant]")
    answer = spell(t, "A red circle.", t.eot)
    assert recipe.tokens.tolist() == prompt + answer
    assert recipe.weights.tolist() == [0.0] * len(prompt) + [1.0] * len(answer)
    data_config = replace(data_config, loss_on="all")
    with pytest.raises(UserError, match="assistant, caption"):
        make_recipe(conversation, t, data_config, 1, V)


@pytest.mark.parametrize(
    "frames, k, v, vision, whole",
    [
        (1, 1, 256, 256, 259),  # stage 1
        (8, 1, 256, 2048, 2058),  # stage 2
        (16, 2, 256, 2048, 2058),  # stage 3
        (64, 2, 256, 8192, 8226),  # stage 4, at most
        (160, 2, 256, 20_480, 20_562),  # stage 5, at most
    ],
)
def test_token_arithmetic_of_the_stages(
    tokenizer: Tokenizer, tmp_path: Path, frames: int, k: int, v: int, vision: int, whole: int
) -> None:
    config = DataConfig()
    config = replace(config, min_frames=frames, max_frames=frames, max_sample_tokens=22_528, tokens_per_pack=22_528)
    config = replace(config, frames_per_pack=160)
    path = write_video(tmp_path / "a.mp4", 8, 8)
    conversation = chat("<video>Q", "A", media=(Media("video", str(path)),))
    recipe = make_recipe(conversation, tokenizer, config, k, v)
    t = tokenizer
    assert recipe.frames == frames and int(recipe.is_vision.sum()) == vision
    begin, end = (recipe.tokens.tolist().index(mark) for mark in (t.vi_start, t.vi_end))
    assert end - begin + 1 == whole == video_block_length(frames, k, v)
    counts = {mark: int((recipe.tokens == mark).sum()) for mark in (t.eof, t.eov, t.vi_start, t.vi_end)}
    assert counts == {t.eof: frames // k - 1, t.eov: 1, t.vi_start: 1, t.vi_end: 1}


def test_long_samples_lose_whole_rounds(tokenizer: Tokenizer, data_config: DataConfig, media: Path) -> None:
    video = Media("video", str(media / "2s.mp4"))
    conversation = chat("<video>\nQ", "A", "Q " * 5, "A " * 5, "<video>Q", "A", media=(video, video))
    whole = make_recipe(conversation, tokenizer, data_config, K, V)
    assert whole.frames == 8
    for limit in range(len(whole.tokens), 20, -1):
        data_config = replace(data_config, max_sample_tokens=limit)
        try:
            recipe = make_recipe(conversation, tokenizer, data_config, K, V)
        except UserError as error:
            assert "to its first answer, but a sample may have" in str(error)
            assert limit < 60
            break
        n = len(recipe.tokens)
        assert n <= limit and recipe.tokens[-1] == tokenizer.eot and recipe.weights[-1] == 1
        np.testing.assert_array_equal(recipe.tokens, whole.tokens[:n])
        assert int(recipe.is_vision.sum()) == recipe.frames // K * V
        assert recipe.frames in (4, 8)
    else:
        pytest.fail("the first round was never too long")
    data_config = replace(data_config, max_sample_tokens=256, frames_per_pack=4)
    assert make_recipe(conversation, tokenizer, data_config, K, V).frames == 4
    data_config = replace(data_config, frames_per_pack=2)
    with pytest.raises(UserError, match="4 frames to its first answer"):
        make_recipe(conversation, tokenizer, data_config, K, V)


def test_a_question_after_the_last_answer_is_left_out(tokenizer: Tokenizer, data_config: DataConfig) -> None:
    a = make_recipe(chat("Q", "A", "Q2"), tokenizer, data_config, K, V)
    b = make_recipe(chat("Q", "A"), tokenizer, data_config, K, V)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    with pytest.raises(UserError, match="no assistant's turn"):
        make_recipe(chat("Q"), tokenizer, data_config, K, V)


def test_planning_of_media(media: Path) -> None:
    policy = FramePolicy(min_frames=4, max_frames=8, multiple=2)
    path = str(media / "20s.mp4")
    whole, part, sparse = plan_media(
        [
            Media("video", path),
            Media("video", path, start=2.0, end=5.0, fps=2.0),
            Media("video", path, max_frames=3),
        ],
        policy,
        2,
    )
    assert len(whole.times) == 8 and whole.times[0] == 1.25
    assert part.times == (0.25, 0.75, 1.25, 1.75, 2.25, 2.75) and part.start == 2.0
    assert len(sparse.times) == 2
    odd = plan_media([Media("video", path, max_frames=3)], FramePolicy(multiple=1), 2)[0]
    assert len(odd.times) == 4 and odd.times[2] == odd.times[3]  # the last frame again, and its time
    with pytest.raises(UserError, match="no such file"):
        plan_media([Media("video", str(media / "no.mp4"))], policy, 2)
    with pytest.raises(UserError, match="no video between"):
        plan_media([Media("video", path, start=30.0)], policy, 2)


def test_a_duration_in_the_record_is_believed_and_the_file_not_opened(media: Path) -> None:
    policy, asked = FramePolicy(min_frames=4, max_frames=8, multiple=2), []

    def prober(path: str, kind: str) -> MediaInfo:
        asked.append(path)
        return MediaInfo("video", 64, 48, 10.0, 8.0, "h264")

    def times(**options: float) -> tuple[float, ...]:
        return plan_media([Media("video", "a.mp4", **options)], policy, 2, prober)[0].times

    assert times(duration=6.0) == tuple(i + 0.5 for i in range(6)) and not asked
    assert times(duration=20.0, start=4.0, end=8.0) == (0.5, 1.5, 2.5, 3.5) and not asked
    assert times(duration=4.0, start=4.0, end=8.0) == (0.5, 1.5, 2.5, 3.5) and asked == ["a.mp4"]  # that of a clip
    assert len(times()) == 8 and len(asked) == 2


DURATIONS = [(6, 6.0), ([6.5], 6.5), ("PT6S", None), (0, None), ([1, 2], None), (-1, None)]


@pytest.mark.parametrize(("value", "seconds"), DURATIONS)
def test_a_duration_that_is_no_number_of_seconds_is_passed_over(value: object, seconds: float | None) -> None:
    record = {"id": "1", "video": "a.mp4", "duration": value}
    record["conversations"] = [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "!"}]
    assert parse_record(record, "line 1", "").conversation.media[0].duration == seconds
    part = {"type": "video", "video": "a.mp4", "duration": value}
    turns = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}, {"role": "assistant", "content": "!"}]
    if not isinstance(value, list):
        assert parse_record({"messages": turns}, "line 1", "").conversation.media[0].duration == seconds


def test_prompt_is_the_beginning_of_the_sample(tokenizer: Tokenizer, data_config: DataConfig, media: Path) -> None:
    conversation = chat("<video>\nQ", "A", "Q2", "A2", media=(Media("video", str(media / "5s.mp4")),))
    sample = make_recipe(conversation, tokenizer, data_config, K, V)
    prompt = render_prompt(conversation.split_answer()[0], tokenizer, data_config, K, V)
    n = len(prompt.tokens)
    np.testing.assert_array_equal(prompt.tokens, sample.tokens[:n])
    assert sample.tokens[n:].tolist() == spell(tokenizer, "A2", tokenizer.eot)
    assert prompt.media == sample.media and not prompt.weights.any()
    with pytest.raises(ValueError, match="must end with the user"):
        render_prompt(conversation, tokenizer, data_config, K, V)
    with pytest.raises(ValueError, match="do not match"):
        render_prompt(chat("<video>"), tokenizer, data_config, K, V)


FILM, PICTURE = MediaRef("video", "a.mp4", (0.5, 1.5)), MediaRef("image", "b.png", (0.0, 0.0))


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([FILM, "Q"], "<video>\nQ"),
        ([" Q ", FILM], "Q <video>"),
        (["Q", FILM, PICTURE, "and", "R"], "Q\n<video>\n<image>\nand\nR"),
        ([FILM, "", "\n Q\n"], "<video>\n Q"),
        ([FILM, " Q"], "<video> Q"),
        (["a", " ", "b"], "a b"),
    ],
)
def test_parts_are_the_tokens_of_a_text_with_tags(tokenizer: Tokenizer, parts: list, text: str) -> None:
    made = render_parts([("user", parts)], tokenizer, K, V)
    film, picture = ([tokenizer.vi_start, *[tokenizer.vision] * V, tokenizer.eov, tokenizer.vi_end] for _ in range(2))
    pieces = text.replace("<video>", "|<video>|").replace("<image>", "|<image>|").split("|")
    spelt = [{"<video>": film, "<image>": picture}.get(piece, piece) for piece in pieces if piece]
    expected = spell(tokenizer, tokenizer.bos, "[h:user]", *spelt, tokenizer.eot, "[h:assistant]")
    assert made.tokens.tolist() == expected
    assert made.media == tuple(part for part in parts if not isinstance(part, str))
    assert int(made.is_vision.sum()) == V * len(made.media)


@pytest.mark.parametrize("text", ["What is <video>?", "C:\\", "<vi_start><|eot_id|>", "\\<image>"])
def test_text_of_parts_is_text(tokenizer: Tokenizer, text: str) -> None:
    made = render_parts([("user", [text, FILM])], tokenizer, K, V)
    assert made.media == (FILM,)
    before = spell(tokenizer, tokenizer.bos, "[h:user]", text + "\n")
    assert made.tokens.tolist()[: len(before) + 1] == [*before, tokenizer.vi_start]


def test_an_answer_may_be_begun(tokenizer: Tokenizer) -> None:
    turns = [("user", ["Q"]), ("assistant", ["Best option:("])]
    begun = render_parts(turns, tokenizer, K, V, leave_open=True)
    asked = spell(tokenizer, tokenizer.bos, "[h:user]", "Q", tokenizer.eot, "[h:assistant]", "Best option:(")
    assert begun.tokens.tolist() == asked
    closed = render_parts(turns, tokenizer, K, V, ask=False)
    assert closed.tokens.tolist() == [*asked, tokenizer.eot]
