"""Annotation files as outsiders write them: tar shards with stray members, tables, text files of many shapes."""

import gzip
import io
import json
import os
import tarfile
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kangaroo_jax.config import DataConfig
from kangaroo_jax.curation.engine.manifest import read_inputs
from kangaroo_jax.data.annotations import sources
from kangaroo_jax.data.annotations.conversation import Conversation
from kangaroo_jax.data.annotations.sources import AnnotationFile
from kangaroo_jax.data.batches import feed
from kangaroo_jax.data.batches.ledger import Ledger
from kangaroo_jax.data.batches.loader import make_loader
from kangaroo_jax.data.batches.mixture import Mixture, open_sources
from kangaroo_jax.data.media.containers import member_of
from kangaroo_jax.data.media.image import load_image
from kangaroo_jax.data.tokenizer import Tokenizer
from kangaroo_jax.errors import UserError
from tests.data.media import numbered_frame, read_number, write_video

RECORD = {"conversations": [{"from": "human", "value": "<video>Q"}, {"from": "gpt", "value": "A"}]}
GOOD = RECORD | {"id": "g", "video": "v.mp4"}
LINE = json.dumps(GOOD)


def picture(number: int, kind: str = "PNG", frames: int = 1) -> bytes:
    file = io.BytesIO()
    images = [Image.fromarray(numbered_frame(number + i)) for i in range(frames)]
    images[0].save(file, kind, **({"save_all": True, "append_images": images[1:]} if frames > 1 else {}))
    return file.getvalue()


def write_tar(path: Path, *members: tuple[str, bytes | str]) -> Path:
    """Members with their bytes; a text is the target of a link."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, str):
                info.type, info.linkname = tarfile.SYMTYPE, data
                archive.addfile(info)
            else:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


# ---------------------------------------------------------------------------------- tar shards

JSON = json.dumps(RECORD).encode()
STRAY: list[tuple[str, bytes]] = [
    ("._0.json", b"\0\5\x16\7"),
    ("._0.mp4", b"\0"),
    ("README", b"hello"),
    ("README.md", b"hello"),
    ("index.txt", b"0\n1\n"),
    (".hidden.txt", b"x"),
    ("a/.DS_Store", b"x"),
    ("__MACOSX/0.json", b"x"),
]


@pytest.mark.parametrize("member", STRAY, ids=[name for name, _ in STRAY])
def test_stray_members_are_passed_over_and_counted(tmp_path: Path, member: tuple[str, bytes]) -> None:
    for order in (0, 1):
        members = [("0.json", JSON), ("0.mp4", b"x" * 9)]
        file = AnnotationFile(
            write_tar(tmp_path / f"{order}.tar", *([member] * (1 - order) + members + [member] * order))
        )
        assert (
            len(file) == 1 and file[0].media[0].path.endswith("+9") and "1 files that belong to no" in file.describe()
        )


def test_samples_that_downloads_left_unfinished_stop_nothing(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        ("0.txt", b" \n"), ("0.mp4", b"x"),
        ("1.json", b'{"status": "failed_to_download", "caption": "c"}'),
        ("2.jpg", picture(1)),
        ("3.txt", b"\xef\xbb\xbfA caption.\r\n"), ("3.MP4", b"x"),
        ("4.JSON", JSON), ("4.mp4", b"x"),
    )  # fmt: skip
    file = AnnotationFile(path)
    assert [file[i].turns[-1].text for i in (3, 4)] == ["A caption.", "A"]
    for i in range(3):
        with pytest.raises(UserError, match=f"sample {i}: needs a .json"):
            file[i]


def test_members_are_told_apart_by_what_is_in_them(tmp_path: Path) -> None:
    still, moving = picture(5), picture(5, "GIF", 4)
    path = write_tar(
        tmp_path / "a.tar",
        ("0.json", JSON), ("0.webp", picture(3, "WEBP", 3)),
        ("1.json", JSON), ("1.gif", moving),
        ("2.txt", b"moves"), ("2.gif", moving),
        ("3.txt", b"stands"), ("3.png", still),
        ("4.txt", b"both"), ("4.gif", picture(5, "GIF")),
        ("5.txt", b"a film"), ("5.gif", write_video(tmp_path / "a.mp4", 8, 8).read_bytes()),
    )  # fmt: skip
    file = AnnotationFile(path)
    assert [file[i].media[0].kind for i in range(6)] == ["video", "video", "video", "image", "image", "video"]


@pytest.mark.parametrize("caption", ["你好".encode("gbk"), "hello".encode("utf-16")], ids=["GBK", "UTF-16"])
def test_a_caption_in_another_encoding_is_not_learnt(tmp_path: Path, caption: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", ("0.txt", caption), ("0.png", picture(1)), ("1.txt", b"x"), ("1.png", b"x"))
    file = AnnotationFile(path)
    assert file[1].turns[-1].text == "x"
    with pytest.raises(UserError, match="sample 0: its caption is not UTF-8 text"):
        file[0]


@pytest.mark.parametrize("name", ["a\nb", "\U0001f600 '\"", "x" * 150])
def test_members_of_odd_names(tmp_path: Path, name: str) -> None:
    (sample,) = [AnnotationFile(write_tar(tmp_path / "a.tar", (f"{name}.txt", b"x"), (f"{name}.png", picture(5))))[0]]
    assert read_number(load_image(sample.media[0].path, 48)) == 5


def test_links_in_a_tar(tmp_path: Path) -> None:
    inside = write_tar(tmp_path / "a.tar", ("v/0.mp4", b"xyz"), ("0.json", JSON), ("0.mp4", "v/0.mp4"))
    (sample,) = [c for c in map(AnnotationFile(inside).look_at, range(2)) if not isinstance(c, UserError)]
    member = member_of(sample.media[0].path)
    assert member is not None and member.read() == b"xyz"
    outside = write_tar(tmp_path / "b.tar", ("0.json", JSON), ("0.mp4", "/data/0.mp4"))
    with pytest.raises(UserError, match=r"sample 0: 0.mp4 is a link .* tar -h"):
        AnnotationFile(outside)


def test_a_member_larger_than_its_archive_and_packed_archives(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", ("0.json", JSON), ("0.mp4", b"x" * 5000))
    os.truncate(path, 3000)
    with pytest.raises(UserError, match="cut short"):
        AnnotationFile(path)
    header = tarfile.TarInfo("long name")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 60
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(UserError, match="a.tar: not a readable tar archive.*more than the memory holds"):
        AnnotationFile(path)
    header = tarfile.TarInfo("0.json")
    header.size = 1 << 41
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT))
    os.truncate(path, 1 << 42)  # a file with a hole
    with pytest.raises(UserError, match="a text of 2,199,023,255,552 bytes in it is no record and no caption"):
        AnnotationFile(path)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(UserError, match="a.tar.gz: unpack it first"):
        AnnotationFile(tmp_path / "a.tar.gz")


# ---------------------------------------------------------------------------------- text files

TABLE = 'video,question,answer,start\nv.mp4,"What, and\nwhere?",A,1.5\nw.mp4,Q,B,\n'
TEXTS: list[tuple[str, bytes, int]] = [
    ("object.json", json.dumps({"data": [GOOD, GOOD]}, indent=2).encode(), 2),
    ("object_in_a_line.json", json.dumps({"version": 1, "annotations": [GOOD, GOOD]}).encode(), 2),
    ("by_name.json", json.dumps({"0": GOOD, "1": GOOD}).encode(), 2),
    ("pretty.json", json.dumps(GOOD, indent=1).encode(), 1),
    ("pretty.jsonl", (json.dumps(GOOD, indent=1) + "\n" + json.dumps(GOOD, indent=1)).encode(), 2),
    ("one.json", LINE.encode(), 1),
    ("lines.json", f"{LINE}\n{LINE}\n".encode(), 2),
    ("lines.jsonl.gz", gzip.compress(f"{LINE}\n{LINE}\n".encode()), 2),
    ("list.json.gz", gzip.compress(json.dumps([GOOD] * 3).encode()), 3),
    ("mark.jsonl", b"\xef\xbb\xbf" + LINE.encode(), 1),
    ("table.csv", TABLE.encode(), 2),
    ("table.tsv", b"\xef\xbb\xbf" + b"video\tcaption\nv.mp4\tA dog.\n", 1),
]


@pytest.mark.parametrize("name, data, count", TEXTS, ids=[name for name, *_ in TEXTS])
def test_text_files_of_many_shapes(tmp_path: Path, name: str, data: bytes, count: int) -> None:
    (tmp_path / name).write_bytes(data)
    file = AnnotationFile(tmp_path / name)
    assert len(file) == count
    assert {conversation.media[0].path for conversation in map(file.__getitem__, range(count))} <= {
        str(tmp_path / "v.mp4"),
        str(tmp_path / "w.mp4"),
    }


def test_a_table_has_its_options_and_names_its_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(TABLE)
    file = AnnotationFile(tmp_path / "a.csv")
    assert file[0].turns[0].text == "<video>\nWhat, and\nwhere?" and file[0].media[0].start == 1.5
    (tmp_path / "a.csv").write_text(TABLE + "v.mp4,Q\n")
    with pytest.raises(UserError, match="a.csv, line 5: has fewer fields"):
        AnnotationFile(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("file,label\nv.mp4,3\n")
    with pytest.raises(UserError, match="line 2: 'conversations' must be a list .* has 'file', 'label'.* 'question'"):
        AnnotationFile(tmp_path / "a.csv")


HOSTILE: list[tuple[str, bytes]] = [
    ("deep.jsonl", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    ("deep.json", b"[" * 100_000 + b"]" * 100_000),
    ("digits.jsonl", b'{"id": ' + b"9" * 5000 + b"}"),
    ("start.jsonl", json.dumps(GOOD | {"start": 10**400}).encode()),
    ("gap.jsonl", b"\x00\xff\xfe"),
    ("list.json", b"[1, [2"),
    ("number.json", b"7"),
    ("cut.jsonl.gz", gzip.compress(LINE.encode())[:-9]),
    ("utf16.jsonl", LINE.encode("utf-16")),
]


@pytest.mark.parametrize("name, data", HOSTILE, ids=[name for name, _ in HOSTILE])
def test_hostile_text_is_refused_in_one_line(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        AnnotationFile(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl"])
def test_a_file_with_a_hole_and_a_pipe_are_no_annotations(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[")
    os.truncate(tmp_path / name, 1 << 41)
    with pytest.raises(UserError, match="2,048 GiB, of which the disk holds"):
        AnnotationFile(tmp_path / name)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="a pipe, device or folder"):
        AnnotationFile(tmp_path / name)


def test_several_wrong_records_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join([LINE, "{}", LINE, "[]", "{"]))
    with pytest.raises(UserError, match=r"line 2: .*; 2 more of 5 records are wrong: kangaroo data check lists them"):
        AnnotationFile(tmp_path / "a.jsonl")
    file = AnnotationFile(tmp_path / "a.jsonl", check=False)
    assert [isinstance(file.look_at(i), UserError) for i in range(5)] == [False, True, False, True, True]


def test_no_record_ends_a_training(
    tmp_path: Path, tokenizer: Tokenizer, data_config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    good = [json.dumps({"id": f"g{i}", "conversations": talk}) for i in range(6)]
    bad = [data.decode() for _, data in HOSTILE[:3]] + [json.dumps({"id": "odd", "conversations": talk})]
    (tmp_path / "a.jsonl").write_text("\n".join([*good[:3], *bad, *good[3:]]))
    monkeypatch.setattr(sources, "CHECKED", 2)
    made = feed.make_recipe

    def breaks(conversation: Conversation, *more: Any) -> Any:
        if conversation.id == "odd":
            raise KeyError("a mistake of ours,\nor of a library")
        return made(conversation, *more)

    monkeypatch.setattr(feed, "make_recipe", breaks)
    data_config = replace(data_config, train=(str(tmp_path / "a.jsonl"),))
    sizes = {"frames_per_group": 2, "tokens_per_group": 3, "seed": 1, "num_threads": 2}
    loader = make_loader(data_config, tokenizer, ledger=Ledger(tmp_path / "l.jsonl"), **sizes)
    seen = {name for _ in range(4) for name in next(loader)[1].sample_ids}
    loader.close()
    assert seen == {f"g{i}" for i in range(6)}
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    assert len(reasons) == 4 and any("cannot be used (KeyError" in reason for reason in reasons)
    data_config = replace(data_config, strict=True)
    loader = make_loader(data_config, tokenizer, ledger=Ledger(), **sizes)
    with pytest.raises(UserError, match=r"config.data.strict"):
        for _ in range(9):
            next(loader)
    loader.close()


# ---------------------------------------------------------------------------------- Parquet

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
TALK = [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]


def table(path: Path, rows: list[dict[str, Any]], **options: Any) -> AnnotationFile:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return AnnotationFile(path)


def test_media_in_a_table_beside_it_or_neither(tmp_path: Path) -> None:
    Image.fromarray(numbered_frame(9)).save(tmp_path / "i.png")
    images = [
        {"bytes": picture(3), "path": "a.png"},
        {"bytes": None, "path": "i.png"},
        None,
        {"bytes": picture(4), "path": None},
    ]
    rows = [{"image": image, "conversations": TALK} for image in images]
    rows[2] = {"image": None, "conversations": [{"from": "human", "value": "Q"}, TALK[1]]}
    file = table(tmp_path / "a.parquet", rows, row_group_size=3)
    for _ in range(2):  # in any order
        for i, number in ((3, 4), (0, 3), (1, 9)):
            assert read_number(load_image(file[i].media[0].path, 48)) == number
    assert not file[2].media


def test_bytes_without_a_struct_and_lists_of_media(tmp_path: Path) -> None:
    file = table(tmp_path / "a.parquet", [{"image": picture(i), "conversations": TALK} for i in range(4)])
    assert [read_number(load_image(file[i].media[0].path, 48)) for i in (2, 0, 3)] == [2, 0, 3]
    both = [{"from": "human", "value": "<image><image>Q"}, TALK[1]]
    images = [{"bytes": picture(5), "path": None}, {"bytes": picture(6), "path": None}]
    file = table(tmp_path / "b.parquet", [{"image": images, "conversations": both}] * 2)
    assert [read_number(load_image(medium.path, 48)) for medium in file[1].media] == [5, 6]


@pytest.mark.parametrize("kind", ["dictionary", "fixed", "large", "view"])
def test_bytes_of_every_type_of_column(tmp_path: Path, kind: str) -> None:
    media = pa.array([picture(5)] * 3)
    types = {"fixed": pa.binary(len(picture(5))), "large": pa.large_binary(), "view": pa.binary_view()}
    media = media.dictionary_encode() if kind == "dictionary" else media.cast(types[kind])
    pq.write_table(pa.table({"image": media, "caption": ["x"] * 3}), tmp_path / "a.parquet")
    file = AnnotationFile(tmp_path / "a.parquet")
    assert [read_number(load_image(file[i].media[0].path, 48)) for i in (2, 0)] == [5, 5]


def test_decimals_are_numbers(tmp_path: Path) -> None:
    row = {"video": "a.mp4", "caption": "x", "start": Decimal("1.5"), "end": Decimal("2.5")}
    assert table(tmp_path / "a.parquet", [row])[0].media[0].start == 1.5


def test_tables_with_dictionaries_and_other_columns(tmp_path: Path) -> None:
    talks = [json.dumps([{"from": "human", "value": f"Q{i}"}, TALK[1]]) for i in range(70)]
    rows = [{"id": str(i % 3), "more": [1.0] * 5, "conversations": talk} for i, talk in enumerate(talks)]
    made = pa.Table.from_pylist(rows)
    made = made.set_column(0, "id", made.column("id").dictionary_encode())
    pq.write_table(made, tmp_path / "a.parquet", row_group_size=40)
    file = AnnotationFile(tmp_path / "a.parquet")
    assert [(file[i].id, file[i].turns[0].text) for i in (69, 0, 33, 41)] == [
        (str(i % 3), f"Q{i}") for i in (69, 0, 33, 41)
    ]


def test_a_damaged_table_is_refused_in_one_line(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "Q"}, TALK[1]]
    table(tmp_path / "a.parquet", [{"id": "long name", "conversations": talk}], use_dictionary=False)
    whole = (tmp_path / "a.parquet").read_bytes()
    for old, new in ((b"long name", b"long\xff\xfename"[:9]), (b"conversations", b"conversation\xff")):
        path = tmp_path / f"{len(new)}.parquet"
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(UserError, match=r"parquet"):
            AnnotationFile(path)


def test_a_table_that_grows_without_end_is_refused(tmp_path: Path) -> None:
    word = pa.array(["x" * (1 << 20)]).dictionary_encode()
    ids = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), word.dictionary)
    talk = pa.array([[{"from": "human", "value": "Q"}, TALK[1]]] * 300)
    pq.write_table(pa.table({"id": ids, "conversations": talk}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 5000
    with pytest.raises(UserError, match="take more than 100 times the file's size"):
        AnnotationFile(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="take more than 100 times the file's size"):
        read_inputs([str(rename(tmp_path / "a.parquet", id="path"))])


@pytest.mark.parametrize(
    ("images", "words"),
    [(pa.nulls(200_000, pa.binary()), "200,000 rows in"), ([b"x" * (66 << 20)], "more than 0.0628 GiB of media")],
    ids=["rows", "media"],
)
def test_a_table_of_media_that_grows_without_end_is_refused(tmp_path: Path, images: Any, words: str) -> None:
    """Rows that cost nothing were looked at one by one, for hours; a medium came out of next to nothing."""
    table = pa.table({"image": images, "caption": pa.array(["A"] * len(images)).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", row_group_size=len(images))
    with pytest.raises(UserError, match=words):
        source = AnnotationFile(tmp_path / "a.parquet")
        member_of(source[0].media[0].path)


def rename(path: Path, **names: str) -> Path:
    """A table with other names of columns."""
    table = pq.read_table(path)
    pq.write_table(table.rename_columns([names.get(n, n) for n in table.column_names]), path, compression="zstd")
    return path


# ---------------------------------------------------------------------------------- names of sources


def named(tmp_path: Path, *names: str) -> list[str]:
    """Files of so many records as their place in the list says; a folder's name gives the number."""
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("".join(LINE + "\n" for _ in range(10 + len(name))))
    return [str(tmp_path / name) for name in names]


def test_sources_keep_the_names_of_a_saved_run(tmp_path: Path) -> None:
    first, second = named(tmp_path, "a/train.jsonl", "bb/train.jsonl")
    before = Mixture(open_sources([first, second], ""), 3, 2)
    assert [source.name for source in before.sources] == ["train", "bb/train"]
    (front,) = named(tmp_path, "ccc/train.jsonl")
    after = Mixture(open_sources([front, first, second], ""), 3, 2)
    after.keep_names(before.identity())
    assert [source.name for source in after.sources] == ["ccc/train", "train", "bb/train"]
    assert [after.sample_index(1, i + 1, 5)[1] for i in range(2)] == [before.sample_index(1, i, 5)[1] for i in range(2)]


def test_a_built_dataset_has_its_own_name_and_answers_to_the_old_one(tmp_path: Path) -> None:
    (path,) = named(tmp_path, "set/1.0.0")
    (other,) = named(tmp_path, "other.jsonl")
    mixture = Mixture(open_sources([path, other], ""), 3, 2)
    assert [source.name for source in mixture.sources] == ["set", "other"]
    saved = {"1.0": mixture.identity()["set"], "other": mixture.identity()["other"]}
    mixture.keep_names(saved)
    assert mixture.identity() == saved
    (tmp_path / "clips/1.0.0").mkdir(parents=True)
    (tmp_path / "clips/1.0.0/dataset_info.json").touch()
    with pytest.raises(UserError, match="clips: a folder is read only if .* wrote it; .*/clips/1.0.0 is one"):
        open_sources([str(tmp_path / "clips")], "")
