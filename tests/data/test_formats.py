"""Every public format is found out and named, and says the same Conversation as every other."""

import base64
import functools
import http.server
import io
import json
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kangaroo_jax.config import DataConfig
from kangaroo_jax.data.annotations.conversation import Conversation, Media, Turn, count_tags, language_of
from kangaroo_jax.data.annotations.format_writing import to_record
from kangaroo_jax.data.annotations.formats import FORMATS, Columns, parse_record
from kangaroo_jax.data.annotations.sources import AnnotationFile, read_conversations
from kangaroo_jax.data.batches.sample import make_recipe
from kangaroo_jax.data.media.download import Limits
from kangaroo_jax.data.media.image import load_image
from kangaroo_jax.data.media.storage import MediaCache, use_cache
from kangaroo_jax.data.media.video import load_video, probe
from kangaroo_jax.data.tokenizer import Tokenizer
from kangaroo_jax.errors import UserError
from tests.data.media import numbered_frame, read_number, write_video

TAGGED = ("llava", "messages", "llama_factory")
PARTS = ("openai", "hf")
COLUMNS = Columns(images="images", videos="videos")

# ------------------------------------------------------------------------- round trips

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>\\"), max_size=12)
paths = st.text("abc/_-.0 é影", min_size=1, max_size=12).map(lambda p: "/m/" + p.strip("/ .") + ".mp4")
clips = st.fixed_dictionaries(
    {},
    optional={
        "start": st.floats(0, 50),
        "end": st.floats(51, 1e4),
        "fps": st.floats(0.01, 60),
        "min_frames": st.integers(1, 16),
        "max_frames": st.integers(17, 200),
        "nframes": st.integers(1, 200),
        "sample_fps": st.floats(0.1, 60),
    },
)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Text alone, images, videos, lists of frames and mixes of them, over several rounds."""
    turns, media = [], []
    if draw(st.booleans()):
        turns.append(Turn("system", draw(texts)))
    for _ in range(draw(st.integers(1, 3))):
        text = ""
        for kind in draw(st.lists(st.sampled_from(["image", "video", "frames"]), max_size=3)):
            text += draw(texts) + ("<image>" if kind == "image" else "<video>")
            frames = tuple(draw(st.lists(paths, min_size=1, max_size=3))) if kind == "frames" else ()
            options = {} if kind == "image" else draw(clips)
            path = frames[0] if frames else draw(paths)
            media.append(Media("image" if kind == "image" else "video", path, frames=frames, **options))
        turns += [Turn("user", text + "\n" + draw(texts)), Turn("assistant", draw(texts))]
    return Conversation(draw(texts), tuple(turns), tuple(media), draw(st.sampled_from(["", "zh", "en"])))


def normal(conversation: Conversation) -> Conversation:
    """As it is read back: a newline after media that begin a turn."""
    return parse_record(to_record(conversation, "messages"), "x", "/").conversation


@settings(deadline=None, max_examples=150)
@given(conversation=conversations(), data=st.data())
def test_every_format_says_the_same(conversation: Conversation, data: st.DataObject) -> None:
    expected = normal(conversation)
    assert [turn.role for turn in expected.turns] == [turn.role for turn in conversation.turns]
    assert expected.media == conversation.media and expected.id == conversation.id
    for name in (*TAGGED, *PARTS):
        record = json.loads(json.dumps(to_record(expected, name)))
        parsed = parse_record(record, "x", "/", COLUMNS if name == "llama_factory" else None)
        assert parsed.conversation == expected, name
        if name in TAGGED or any(m["type"] == f"{kind}_url" for m in _parts(record) for kind in ("image", "video")):
            assert parsed.format == name
        assert not parsed.ignored


def _parts(record: dict) -> list[dict]:
    return [part for message in record["messages"] for part in message["content"] if isinstance(part, dict)]


# ----------------------------------------------------------------- files of every kind

EXPECTED = [
    Conversation(
        "a",
        (Turn("user", "<video>\nQ <image> and <image>?"), Turn("assistant", "A")),
        (
            Media("video", "/m/1.mp4", start=1.0, end=4.5, fps=2.0),
            Media("image", "/m/1.png"),
            Media("image", "/m/2.png"),
        ),
    ),
    Conversation("b", (Turn("system", "S"), Turn("user", "Hello"), Turn("assistant", "你好"))),
    Conversation(
        "c",
        (Turn("user", "<video>\nQ"), Turn("assistant", "A")),
        (Media("video", "/f/1.jpg", frames=("/f/1.jpg", "/f/2.jpg"), sample_fps=2.0),),
    ),
]  # fmt: skip


@pytest.mark.parametrize("name", ["llava", "messages", "openai", "hf"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "tar"])
def test_the_kind_of_file_and_the_format_are_found_out(tmp_path: Path, name: str, kind: str) -> None:
    records = [to_record(conversation, name) for conversation in EXPECTED]
    path = tmp_path / f"data.{kind}"
    if kind == "json":
        path.write_text(json.dumps(records))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(record) for record in records))
    elif kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        # Tables cannot hold lists of unlike things: those are JSON text there.
        rows = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()} for record in records]
        keys = sorted({key for row in rows for key in row})
        table = pa.table({key: [row.get(key) for row in rows] for key in keys})
        pq.write_table(table, path, row_group_size=2)
    else:
        write_tar(path, {f"{i:03}.json": json.dumps(record).encode() for i, record in enumerate(records)})
    file = AnnotationFile(path)
    assert [file[i] for i in (2, 0, 1)] == [EXPECTED[i] for i in (2, 0, 1)]
    words = {"llava": "LLaVA", "messages": "ms-swift", "openai": "OpenAI", "hf": "Hugging Face"}
    assert words[name] in file.describe() and "3 samples" in file.describe()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(numbered_frame(number)).save(file, "PNG")
    return file.getvalue()


def test_webdataset_shards_with_their_media(tmp_path: Path) -> None:
    clip = write_video(tmp_path / "v.mp4", 16, 8).read_bytes()
    named = {
        "video": "x/1.mp4",
        "conversations": [{"from": "human", "value": "<video>Q"}, {"from": "gpt", "value": "A"}],
    }
    unnamed = {"messages": [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}]}
    first = {"x/1.json": json.dumps(named).encode(), "x/1.mp4": clip, "2.png": png(5), "2.txt": b"a photo\n"}
    second = {
        "3.json": json.dumps(unnamed).encode(),
        "3.png": png(7),
        "4.png": png(8),
        "4.json": b'{"caption": "eight"}',
    }
    write_tar(tmp_path / "s-000.tar", first)
    write_tar(tmp_path / "s-001.tar", second)
    file = AnnotationFile(tmp_path / "s-{000..001}.tar")
    assert [file[i].id for i in range(4)] == ["x/1", "2", "3", "4"]
    assert [AnnotationFile(tmp_path / "s-*.tar")[i].media for i in range(4)] == [file[i].media for i in range(4)]
    video = file[0].media[0].path
    assert [read_number(x) for x in load_video(video, image_size=48, times=[0.0, 1.0]).pixels] == [0, 8]
    assert probe(video).seconds == pytest.approx(2.0)
    assert [read_number(load_image(file[i].media[0].path, 48)) for i in (1, 2, 3)] == [5, 7, 8]
    assert [file[i].turns[-1].text for i in range(4)] == ["A", "a photo", "A", "eight"]
    write_tar(tmp_path / "bad.tar", {"1.png": png(1), "1.cls": b"3"})
    with pytest.raises(UserError, match=r"bad.tar, sample 1: needs a .json .* it has cls, png"):
        AnnotationFile(tmp_path / "bad.tar")
    (tmp_path / "no.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(UserError, match="no.tar: not a readable tar"):
        AnnotationFile(tmp_path / "no.tar")
    with pytest.raises(UserError, match="s-002.tar: no such tar shard"):
        AnnotationFile(tmp_path / "s-{000..002}.tar")


def test_parquet_with_media_inside(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    talk = [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]
    rows = {
        "id": ["a", "b", "c"],
        "image": [{"bytes": png(i), "path": f"{i}.png"} for i in (3, 4, 5)],
        "conversations": [talk] * 3,
    }
    pq.write_table(pa.table(rows), tmp_path / "t.parquet", row_group_size=2)
    file = AnnotationFile(tmp_path / "t.parquet")
    assert [read_number(load_image(file[i].media[0].path, 48)) for i in range(3)] == [3, 4, 5]


def test_llama_factory_columns() -> None:
    columns = Columns(
        messages="talk", images="pics", system="sys", role="who", content="says", user="me", assistant="it"
    )
    item = {"talk": [{"who": "me", "says": "<image>Q"}, {"who": "it", "says": "A"}], "pics": ["1.png"], "sys": "S"}
    parsed = parse_record(item, "x", "/d", columns)
    assert parsed.format == "llama_factory"
    assert parsed.conversation == Conversation(
        "x", (Turn("system", "S"), Turn("user", "<image>\nQ"), Turn("assistant", "A")), (Media("image", "/d/1.png"),)
    )
    alpaca = {"instruction": "Say", "input": "this", "output": "this.", "history": [["Hi", "Ho"]]}
    turns = parse_record(alpaca, "x", "/", Columns(formatting="alpaca")).conversation.turns
    assert [turn.text for turn in turns] == ["Hi", "Ho", "Say\nthis", "this."]


def test_options_of_parts_and_what_is_ignored(tmp_path: Path) -> None:
    part = {"type": "video", "video": "file:///v/a%20b.mp4", "fps": 2, "nframes": 8, "min_frames": 4, "max_frames": 9}
    part |= {"video_start": 1.5, "video_end": 3, "min_pixels": 3136, "total_pixels": 1 << 20, "resized_height": None}
    content = [part, {"type": "text", "text": "Q"}]
    item = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(item))
    file = AnnotationFile(path)
    assert file[0].media == (Media("video", "/v/a b.mp4", 1.5, 3.0, 2.0, 9, 4, 8),)
    assert file[0].turns[0].text == "<video>\nQ"
    assert "ignored: min_pixels, total_pixels" in file.describe()


def test_loss_of_a_turn_and_media_without_tags() -> None:
    turns = [("user", "Q", None), ("assistant", "A", False), ("user", "Q2", None), ("assistant", "B", 0.5)]
    messages = [{"role": r, "content": c} | ({} if x is None else {"loss": x}) for r, c, x in turns]
    parsed = parse_record({"messages": messages, "videos": ["a.mp4"], "images": ["b.png"]}, "x", "/").conversation
    assert [turn.loss for turn in parsed.turns] == [1, 0, 1, 0.5]
    assert parsed.turns[0].text == "<video><image>\nQ"  # ms-swift's rule
    assert [medium.kind for medium in parsed.media] == ["video", "image"]


def _user(content: Any, role: str = "user", **record: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}], **record}


QA = [("user", "Q"), ("assistant", "A")]
TURNS = [{"role": r, "content": c} for r, c in QA]
TRL = [{"type": "text", "text": "Q", "index": None}, {"type": "image", "text": None, "index": 0}]
LLAVA = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
KINDS: list[tuple[dict[str, Any], str, str, list[tuple[str, str]]]] = [  # record, format, the user's text, media
    ({"video": "v.mp4", "conversations": LLAVA}, "llava", "<video>\nQ", [("video", "/v.mp4")]),
    ({"video": ["v.mp4"], "image": [], "conversations": LLAVA}, "llava", "<video>\nQ", [("video", "/v.mp4")]),
    ({"images": ["i"], "messages": [{"role": "user", "content": TRL}, TURNS[1]]}, "hf", "Q<image>", [("image", "/i")]),
    (
        {
            "videos": ["v", "w"],
            "messages": [{"role": "user", "content": [{"type": "video"}, TRL[0], {"type": "video"}]}, TURNS[1]],
        },
        "hf",
        "<video>\nQ<video>",
        [("video", "/v"), ("video", "/w")],
    ),
    (
        {"images": ["i"], "messages": [{"role": "user", "content": TRL[:1]}, TURNS[1]]},
        "hf",
        "<image>\nQ",
        [("image", "/i")],
    ),
    ({"conversations": TURNS}, "messages", "Q", []),
    ({"image": "i", "conversation": TURNS}, "messages", "<image>\nQ", [("image", "/i")]),
    ({"messages": [{"role": "User", "content": "Q"}, {"role": "Assistant", "content": "A"}]}, "messages", "Q", []),
    ({"query": "<video>Q", "response": "A", "videos": ["v"]}, "query", "<video>\nQ", [("video", "/v")]),
    ({"instruction": "Q", "input": "x", "output": "A"}, "alpaca", "Q\nx", []),
    ({"video": "v", "question": "Q", "answer": "A"}, "question", "<video>\nQ", [("video", "/v")]),
    ({"video_path": "v", "question": "Q", "answer": "A"}, "question", "<video>\nQ", [("video", "/v")]),
    ({"video": "v", "QA": [{"i": "", "q": "Q", "a": "A"}]}, "question", "<video>\nQ", [("video", "/v")]),
    ({"video": "v", "caption": "A"}, "caption", "<video>", [("video", "/v")]),
    ({"path": "i.jpg", "caption": "A"}, "caption", "<image>", [("image", "/i.jpg")]),
    ({"messages": [{"role": "user", "content": "the <video> tag?"}, TURNS[1]]}, "messages", "the \\<video> tag?", []),
    (
        {"image": "i", "conversations": [{"from": "human", "value": "<image>in \\<image>?"}, LLAVA[1]]},
        "llava",
        "<image>\nin \\<image>?",
        [("image", "/i")],
    ),
]


@pytest.mark.parametrize("record, name, text, media", KINDS, ids=range(len(KINDS)))
def test_the_kinds_of_records_that_are_about(
    record: dict[str, Any], name: str, text: str, media: list[tuple[str, str]]
) -> None:
    parsed = parse_record(json.loads(json.dumps(record)), "x", "/")
    assert parsed.format == name and name in FORMATS
    assert [turn.text for turn in parsed.conversation.turns] == [text, "A"]
    assert [(medium.kind, medium.path) for medium in parsed.conversation.media] == media


def test_tags_that_are_text_reach_the_model_as_text(tokenizer: Tokenizer, data_config: DataConfig) -> None:
    content = [{"type": "text", "text": "an <image> or \\<video> tag"}]
    parts = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A"}]}
    conversation = parse_record(parts, "x", "/").conversation
    assert not conversation.media and count_tags(conversation.turns) == []
    recipe = make_recipe(conversation, tokenizer, data_config, 2, 3)
    assert (
        tokenizer.encode("an <image> or \\<video> tag")
        == recipe.tokens.tolist()[
            (begin := recipe.tokens.tolist().index(tokenizer.encode("an")[0])) : begin
            + len(tokenizer.encode("an <image> or \\<video> tag"))
        ]
    )
    assert parse_record(to_record(conversation, "hf"), "x", "/").conversation.turns == conversation.turns


def test_what_is_odd_is_noted() -> None:
    talk = [{"from": "human", "value": "<video>Q"}, {"from": "gpt", "value": " "}]
    parsed = parse_record({"video": "v", "fps": 29.97, "conversations": talk}, "x", "/")
    assert sorted(note.split(":")[0].split(" of 10")[0] for note in parsed.notes) == ["'fps'", "an answer is empty"]


MISTAKES: list[tuple[Any, str]] = [
    ({"images": ["i"], "messages": [_user(TRL + TRL[1:])["messages"][0], TURNS[1]]}, "there are 1 in 'images'"),
    ({"images": ["i", "j"], "messages": [_user(TRL)["messages"][0], TURNS[1]]}, "2 files in 'images', but 1 parts"),
    ({"conversations": [{"from": "human", "value": "<video>\nQ"}, LLAVA[1]]}, "1 <video> tags"),
    ({"video": None, "conversations": [{"from": "human", "value": "a <video> b"}, LLAVA[1]]}, "is written \\<video>"),
    ({"video": "v", "question": "Q", "answer": "A", "options": ["A"]}, "has 'options' beside 'question'"),
    ({"video": "v", "question": "Q", "answer": 2}, "'question' and 'answer' must be text"),
    ({"query": "Q", "response": "A", "history": 3}, "'history' must be a list of pairs"),
    ({"caption": "A"}, "a caption is of one medium, and the record names 0"),
    ({"video": "v", "text": "A"}, "the record has 'video', 'text'"),
    ({"video": "v", "start": 10**400, "caption": "A"}, "'start' must be a positive number"),
    ({"conversations": [{"from": "function_call", "value": "{}"}]}, "calls of tools are not read"),
    (_user([{"type": "audio", "audio": "a.wav"}]), 'part of type "audio"'),
    (_user([{"type": "video", "video": 3}]), "must be a path or address"),
    (_user([{"type": "video", "video": "a", "fps": 0}]), "'fps' must be a positive"),
    (_user([{"type": "image", "image": "a"}], role="assistant"), "it may only say text"),
    (_user("Q", audios=["a.wav"]), "sound is not supported"),
    (_user("Q", role="tool"), "turn 1 needs 'role'"),
    (_user("<video>", videos=[["a", 1]]), "'videos' must be a path"),
    (_user("<video>", videos=[]), "1 <video> tags"),
    (_user("<video>", videos=["a"], start=5, end=4), "is not before"),
    (_user("<video>", videos=["a"], min_frames=9, max_frames=4), "is more than"),
    ([], "'messages' must be a list of turns"),
]


@pytest.mark.parametrize("item, words", MISTAKES)
def test_mistakes(item: Any, words: str) -> None:
    with pytest.raises(UserError) as error:
        parse_record(item, "f.jsonl, line 3", "/")
    assert str(error.value).startswith("f.jsonl, line 3: ") and words in str(error.value)


def test_languages() -> None:
    def of(text: str, language: str = "") -> str:
        return language_of(Conversation("x", (Turn("user", "Q"), Turn("assistant", text)), (), language))

    assert [of("A cat."), of("一只猫在睡觉。"), of("猫がいます"), of("고양이"), of("Кошка"), of("Über")] == [
        "en", "zh", "ja", "ko", "ru", "en",
    ]  # fmt: skip
    assert of("A cat.", "fr") == "fr"


# ------------------------------------------------------------------------------ addresses


def test_addresses_go_through_a_bounded_cache(tmp_path: Path) -> None:
    served = tmp_path / "served"
    served.mkdir()
    clip = write_video(served / "v.mp4", 16, 8).read_bytes()
    for i in range(5):
        (served / f"{i}.mp4").write_bytes(clip)
    cache = MediaCache(tmp_path / "cache", 3 * len(clip), Limits(allow_private=True))
    use_cache(cache)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_address[1]}"
        image = "data:image/png;base64," + base64.b64encode(png(6)).decode()
        talk = [
            {"type": "video_url", "video_url": {"url": f"{root}/v.mp4"}},
            {"type": "image_url", "image_url": {"url": image}},
        ]
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps([{"role": "user", "content": talk}, {"role": "assistant", "content": "A"}]))
        (conversation,) = read_conversations([path])
        video, photo = conversation.media
        assert read_number(load_image(photo.path, 48)) == 6
        for _ in range(2):
            assert read_number(load_video(video.path, image_size=48, times=[1.0]).pixels[0]) == 8
        (served / "v.mp4").unlink()
        assert probe(video.path).seconds == pytest.approx(2.0)  # it is here
        for i in range(5):  # the cache stays within its bound, and forgets the oldest
            cache.fetch(f"{root}/{i}.mp4")
            assert sum(file.stat().st_size for file in cache.folder.iterdir()) <= cache.limit
        with pytest.raises(UserError, match="v.mp4: cannot be fetched .404"):
            probe(video.path)
        server.shutdown()
    assert not list(cache.folder.glob(".part-*"))
    with pytest.raises(UserError, match="addresses are https"):
        probe("nosuch://bucket/v.mp4")
