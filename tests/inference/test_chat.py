"""Chat about real files with a small random model: what is said does not matter, that it is said right does."""

import base64
import functools
import http.server
import json
import tarfile
import threading

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kangaroo_jax.checkpoints.reading import keep_tokenizer
from kangaroo_jax.cli.chat import chat, talk, typed
from kangaroo_jax.config import ModelConfig
from kangaroo_jax.data.annotations.conversation import Conversation, Media, Turn
from kangaroo_jax.data.media.decode import decode_one
from kangaroo_jax.data.media.storage import MediaCache, use_cache
from kangaroo_jax.data.media.video import folder_of_frames
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.chat import Kangaroo
from kangaroo_jax.inference.history import ask, conversation
from kangaroo_jax.inference.sampling import Sampling
from kangaroo_jax.models.parameters import abstract_model
from kangaroo_jax.training.checkpoint import Checkpoints
from kangaroo_jax.training.step import TrainState

SHORT = dict(max_new_tokens=12)


def encoded(kangaroo: Kangaroo) -> int:
    """Frames that the ViT has looked at so far."""
    return kangaroo.stats()["frames_encoded"]


def test_rounds_need_no_video_again_and_look_at_it_once(kangaroo, media):
    answer, history = kangaroo.chat(video=media / "a.mp4", query="What moves?", **SHORT)
    assert [turn["role"] for turn in history] == ["user", "assistant"] and history[1]["text"] == answer
    history = json.loads(json.dumps(history))
    second, longer = kangaroo.chat(query="Which way?", history=history, **SHORT)
    assert len(longer) == 4 and len(history) == 2 and encoded(kangaroo) == 4
    blind, _ = kangaroo.chat(
        query="Which way?", history=[{**history[0], "text": "What moves?", "media": []}, history[1]]
    )
    again, _ = kangaroo.chat(video=media / "b.mp4", query="What moves?", **SHORT)
    assert blind != second and again != answer and encoded(kangaroo) == 10


def test_a_changed_file_is_looked_at_again(kangaroo, media, tmp_path):
    video = tmp_path / "v.mp4"
    video.write_bytes((media / "a.mp4").read_bytes())
    first, _ = kangaroo.chat(video=video, query="What moves?", **SHORT)
    video.write_bytes((media / "b.mp4").read_bytes())
    second, _ = kangaroo.chat(video=video, query="What moves?", **SHORT)
    assert first != second and encoded(kangaroo) == 10


def test_the_prompt_is_that_of_training(kangaroo, media):
    t = kangaroo.tokenizer
    recipe = kangaroo.recipe(conversation([ask("What moves?", video=media / "a.mp4")]))
    group = [t.vision] * 1  # a group of two frames of 2 x 2 patches is one token
    body = [t.vi_start, *group, t.eof, *group, t.eov, t.vi_end, *t.encode("\nWhat moves?"), t.eot]
    user = [t.start_header, *t.encode("user"), t.end_header, *t.encode("\n\n")]
    assistant = [t.start_header, *t.encode("assistant"), t.end_header, *t.encode("\n\n")]
    assert recipe.tokens.tolist() == [t.bos, *user, *body, *assistant]


def test_start_and_end_choose_a_part_of_the_video(kangaroo, media):
    whole = kangaroo.recipe(conversation([ask("?", video=media / "b.mp4")]))
    part = kangaroo.recipe(conversation([ask("?", video=media / "b.mp4", start=2.0, end=4.0)]))
    assert whole.frames == 6 and part.frames == 2
    assert part.media[0].start == 2.0 and max(part.media[0].times) < 2.0


def test_video_and_image_stand_where_the_query_says(kangaroo, media):
    files = dict(video=media / "a.mp4", image=media / "c.jpg")
    assert [m["kind"] for m in ask("Same?", **files)["media"]] == ["video", "image"]
    turn = ask("Is <image> in <video>?", **files)
    assert [m["kind"] for m in turn["media"]] == ["image", "video"] and turn["text"] == "Is <image> in <video>?"
    assert kangaroo.recipe(conversation([turn])).frames == 2 + 4
    with pytest.raises(UserError, match="the query has the tags video, but 0 files"):
        ask("What is in <video>?")


@pytest.fixture(scope="module")
def shown(tmp_path_factory, media) -> dict[str, str]:
    """The same three colours, 4 s, in every way that training reads a video; and stills."""
    folder = tmp_path_factory.mktemp("shown")
    frames = [
        Image.fromarray(np.full((16, 16, 3), colour, np.uint8)) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))
    ]
    for suffix in ("gif", "webp", "png"):
        frames[0].save(folder / f"a.{suffix}", save_all=True, append_images=frames[1:], duration=1000)
    (folder / "frames").mkdir()
    for number, frame in enumerate(frames):
        frame.save(folder / "frames" / f"{number}.bmp")
    for name in ("s.jfif", "s.jp2", "s.ppm", "s.pcx", "still"):
        frames[0].save(folder / name, format={"s.jp2": "JPEG2000", "s.ppm": "PPM", "s.pcx": "PCX"}.get(name, "JPEG"))
    video = (media / "a.mp4").read_bytes()
    (folder / "no ending").write_bytes(video)
    with tarfile.open(folder / "shard.tar", "w") as archive:
        archive.add(media / "a.mp4", "7.mp4")
    with tarfile.open(folder / "shard.tar") as archive:
        (member,) = archive.getmembers()
    pq.write_table(pa.table({"video": [{"bytes": video, "path": "a.mp4"}]}), folder / "t.parquet")
    places = {path.name: str(path) for path in folder.iterdir()}
    return places | {
        "member": f"{folder / 'shard.tar'}::{member.name}@{member.offset_data}+{member.size}",
        "row": f"{folder / 't.parquet'}::0/video/0",
        "file": (folder / "no ending").as_uri(),
        "data": f"data:video/mp4;base64,{base64.b64encode(video).decode()}",
    }


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "frames", "no ending", "member", "row", "file", "data"])
def test_whatever_training_reads_as_a_video_can_be_talked_about(kangaroo, shown, name, monkeypatch, tmp_path):
    use_cache(MediaCache(tmp_path, 1 << 30))
    _, history = kangaroo.chat(video=shown[name], query="What?", **SHORT)
    kangaroo.chat(query="And?", history=json.loads(json.dumps(history)), **SHORT)
    assert encoded(kangaroo) == 4  # the second round has seen it


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "s.jfif", "s.jp2", "s.ppm", "still"])
def test_every_image_format_is_an_image(kangaroo, shown, name):
    (ref,) = kangaroo.recipe(conversation([ask("?", image=shown[name])])).media
    frames = decode_one(ref, 16).pixels
    assert (np.abs(frames.astype(int) - (250, 0, 0)).max(axis=(0, 1, 2)) < 6).all()  # of an animation the first frame


def test_a_list_of_images_is_a_video(kangaroo, shown):
    frames = folder_of_frames(shown["frames"])
    answer, history = kangaroo.chat(video=frames, query="What?", **SHORT)
    assert kangaroo.chat(video=shown["frames"], query="What?", **SHORT)[0] == answer
    kangaroo.chat(query="And?", history=json.loads(json.dumps(history)), **SHORT)
    assert encoded(kangaroo) == 4 and history[0]["media"][0]["frames"] == list(frames)


@pytest.mark.parametrize(
    ("said", "options"),
    [
        ("this is a still image; give it as image", {"video": "still"}),
        ("this is a still image; give it as image", {"video": "s.ppm"}),
        ("this is a video; give it as video", {"image": "no ending"}),
        ("not an image that can be read; give a JPEG, PNG or WebP", {"image": "s.pcx"}),
        ("no video between start 90 s", {"video": "data", "start": 90.0}),
        ("no video between start 90 s", {"video": "frames", "start": 90.0}),
    ],
)
def test_what_is_no_such_medium_is_one_short_line(kangaroo, shown, said, options, tmp_path):
    use_cache(MediaCache(tmp_path, 1 << 30))
    with pytest.raises(UserError, match=said) as error:
        kangaroo.chat(query="?", **{key: shown.get(value, value) for key, value in options.items()})
    assert len(str(error.value)) < 300


def test_streamed_pieces_are_the_answer(kangaroo, media):
    turns = [ask("What moves?", video=media / "a.mp4")]
    for seed in range(2):
        sampling = Sampling(temperature=2.0, top_p=1.0, seed=seed)
        pieces = list(kangaroo.stream(turns, sampling, max_new_tokens=20))
        answer, _ = kangaroo.chat(
            video=media / "a.mp4", query="What moves?", temperature=2.0, top_p=1.0, seed=seed, max_new_tokens=20
        )
        assert "".join(pieces).strip() == answer


def test_answer_many_is_chat_for_each_whatever_the_order_and_batch(kangaroo, media):
    questions = [
        ("<video>\nWhat moves?", [Media("video", str(media / "b.mp4"))]),
        ("What is red?", []),
        ("<image>\nWhich way does the square move?", [Media("image", str(media / "c.jpg"))]),
        ("<video>\nWhich way?", [Media("video", str(media / "a.mp4"), start=1.0)]),
        ("<video>\nWhat is red?", [Media("video", str(media / "b.mp4"))]),
        ("<video>\n视频里有什么?", [Media("video", str(media / "a.mp4"))]),
    ]
    asked = [Conversation(str(i), (Turn("user", text),), tuple(files)) for i, (text, files) in enumerate(questions)]
    answers = kangaroo.answer_many(asked, max_new_tokens=12, batch_size=4)
    assert len(set(answers)) > 1
    for answer, (text, files) in zip(answers, questions, strict=True):
        file = {medium.kind: medium.path for medium in files}
        start = files[0].start if files else None
        alone, _ = kangaroo.chat(query=text, start=start, **file, **SHORT)
        assert answer == alone
    assert kangaroo.answer_many([]) == []


def test_bad_input_is_one_line(kangaroo, media):
    video = media / "a.mp4"
    turns = [ask("What?", video=video), {"role": "assistant", "text": "A."}]
    cases = {
        "the query is empty": dict(query=" "),
        "none.mp4: ": dict(query="?", video=media / "none.mp4"),
        "notes.txt: not a readable video": dict(query="?", video=media / "notes.txt"),
        "give it as image": dict(query="?", video=media / "c.jpg"),
        "give it as video": dict(query="?", image=video),
        "start and end belong to a video": dict(query="?", start=1.0),
        "no video between start 9": dict(query="?", video=video, start=9.0),
        "temperature": dict(query="?", temperature=-1.0),
        "top_p": dict(query="?", top_p=0.0),
        "max_new_tokens": dict(query="?", max_new_tokens=0),
        "turn 1 is none of those": dict(query="?", history=["What?"]),
        "turn 2 is the user's": dict(query="?", history=turns[:1]),
        "do not match": dict(query="?", history=[{**turns[0], "media": []}, turns[1]]),
    }
    for message, arguments in cases.items():
        with pytest.raises(UserError) as error:
            kangaroo.chat(**arguments)
        assert message in str(error.value) and "\n" not in str(error.value), message


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_micro_config, media, random_model):
    """What training would have written: a stage's folder."""
    folder = tmp_path_factory.mktemp("stage5_long_video")
    config = make_micro_config()
    config.model.llm.vocab_size = 300
    params = abstract_model(ModelConfig.from_config(config.model)).flatten(random_model)
    state = TrainState(jnp.int32(7), params, {}, {})
    checkpoints = Checkpoints(folder, state)
    checkpoints.save(state, b"{}", config.to_dict())
    checkpoints.close()
    keep_tokenizer(media / "tokenizer.model", folder)
    return folder


def test_a_loaded_checkpoint_says_the_same(kangaroo, checkpoint, media, capsys):
    options = dict(video=media / "a.mp4", query="What moves?", max_new_tokens=8)
    loaded = Kangaroo.load(checkpoint)
    assert loaded.config.model.llm.vocab_size == 300
    answer, history = kangaroo.chat(**options)
    assert loaded.chat(**options)[0] == answer
    chat(checkpoint=str(checkpoint), video=[str(media / "a.mp4")], query="What moves?", max_new_tokens=8)
    assert capsys.readouterr().out.strip() == answer
    follow, _ = kangaroo.chat(query="And?", history=history, max_new_tokens=8)
    lines = iter(["What moves?", "And?", "", "no"])
    talk(checkpoint, lines, {"video": str(media / "a.mp4")}, max_new_tokens=8)
    assert list(lines) == ["no"]
    assert [line.strip() for line in capsys.readouterr().out.split("\n") if line.strip()] == [
        line.strip() for line in f"{answer}\n{follow}".split("\n") if line.strip()
    ]


def test_an_address_that_is_typed_may_be_of_ones_own_network(checkpoint, media, tmp_path, capsys):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(media))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/a.mp4"
        use_cache(MediaCache(tmp_path, 1 << 30))
        with pytest.raises(UserError, match="a private network"):
            ask("?", video=address)
        talk(checkpoint, ["What moves?"], {"video": address}, max_new_tokens=4)
        server.shutdown()
    assert capsys.readouterr().out.endswith("\n")


def test_nothing_is_loaded_for_a_video_that_is_missing(media, tmp_path):
    with pytest.raises(UserError, match=r"none\.mp4"):
        talk(tmp_path / "no_checkpoint", ["?"], {"video": str(media / "none.mp4")})
    with pytest.raises(UserError, match="no such checkpoint folder"):
        talk(tmp_path / "no_checkpoint", ["?"], {"video": str(media / "a.mp4")})


def test_what_is_typed_ends_with_the_input(monkeypatch, capsys):
    lines = iter(["What?"])

    def answered(prompt: str) -> str:
        print(prompt, end="")
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answered)
    assert list(typed()) == ["What?"]
    assert capsys.readouterr().out == "> > \n"


def test_media_that_several_ask_about_are_decoded_once_and_usage_says_what_was_seen(kangaroo, media):
    turns = [ask(query, video=media / "b.mp4") for query in ("One?", "Two?")] + [ask("?", image=media / "c.jpg")]
    replies = kangaroo.generate([conversation([turn]) for turn in turns], max_new_tokens=2)
    assert kangaroo.stats()["frames_decoded"] == 6 + 2
    usage = [reply.usage for (reply,) in replies]
    assert sorted(u.frames_decoded + u.frames_reused for u in usage) == [2, 6, 6]
    np.testing.assert_allclose(usage[0].frame_times[0], np.arange(6) + 0.5, atol=0.26)
    assert usage[2].frame_times == ((0.0, 0.0),)
