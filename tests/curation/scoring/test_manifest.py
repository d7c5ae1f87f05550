"""Readers of folders and of the manifests that public datasets come with."""

import csv
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kangaroo_jax.curation.engine.manifest import read_inputs
from kangaroo_jax.curation.engine.shards import make_shards
from kangaroo_jax.errors import UserError


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def only(items):
    (item,) = items
    return item


def test_webvid(tmp_path):
    files(tmp_path, "videos/p1/77.mp4")
    row = {"videoid": "77", "contentUrl": "https://x.example/77.mp4", "duration": "PT00H00M10S", "page_dir": "p1"}
    item = only(read_inputs([str(write_csv(tmp_path / "webvid.csv", [row | {"name": "A dog, running"}]))]))
    assert item["path"] == str(tmp_path / "videos/p1/77.mp4")
    assert (item["caption"], item["source_id"], item["source"]) == ("A dog, running", "77", "webvid")
    assert item["kind"] == "video"


def test_youku(tmp_path):
    files(tmp_path, "videos/pretrain/1.mp4")
    row = {"video_id:FILE": "videos/pretrain/1.mp4", "golden_caption": "一只猫", "label": "宠物"}
    item = only(read_inputs([f"youku={write_csv(tmp_path / 'train.csv', [row])}"]))
    assert (item["caption"], item["category"], item["source"]) == ("一只猫", "宠物", "youku")
    assert item["path"].endswith("videos/pretrain/1.mp4")


def test_laion_coyo_and_wukong(tmp_path):
    files(tmp_path, "00001/000010002.jpg", "00000/1.jpg")
    laion = {
        "key": ["000010002"],
        "url": ["https://x.example/a.jpg"],
        "TEXT": ["a cat"],
        "LICENSE": ["CC"],
        "similarity": [0.3],
    }
    pq.write_table(pa.table(laion), tmp_path / "laion.parquet")
    item = only(read_inputs([str(tmp_path / "laion.parquet")]))
    assert item["path"].endswith("00001/000010002.jpg") and item["kind"] == "image"
    assert (item["caption"], item["licence"]) == ("a cat", "CC")
    coyo = {"id": [5], "url": ["https://x.example/none.jpg"], "text": ["a hill"]}
    pq.write_table(pa.table(coyo), tmp_path / "coyo.parquet")
    item = only(read_inputs([str(tmp_path / "coyo.parquet")]))
    assert item["path"] == "" and "none.jpg" in item["missing"]  # not downloaded: scored as broken, not forgotten
    assert only(read_inputs([str(tmp_path / "coyo.parquet")], fetch=True))["path"] == "https://x.example/none.jpg"
    row = {"dir": "00000/1.jpg", "url": "https://x.example/1.jpg", "caption": "山"}
    item = only(read_inputs([str(write_csv(tmp_path / "wukong.csv", [row]))]))
    assert item["path"].endswith("00000/1.jpg") and item["caption"] == "山"


def test_folders_and_clips_of_a_list(tmp_path):
    files(tmp_path, "in/cats/a.mp4", "in/b.webm", "in/photo.JPG", "in/notes.txt")
    items = read_inputs([str(tmp_path / "in")])
    assert {(item["kind"], item["category"]) for item in items} == {("video", "cats"), ("video", ""), ("image", "")}
    (tmp_path / "in/list.jsonl").write_text(
        "".join(
            json.dumps({"path": "b.webm", "start": s, "end": e}) + "\n"
            for s, e in ((0, "00:01:05.5"), (70, 80), (70, 80))
        )
    )
    clips = read_inputs([str(tmp_path / "in/list.jsonl")])
    assert sorted((clip["start"], clip["end"]) for clip in clips) == [(0.0, 65.5), (70.0, 80.0), (70.0, 80.0)]
    assert len({clip["id"] for clip in clips}) == 3


def test_ids_do_not_depend_on_where_the_folder_lies(tmp_path):
    ids = []
    for place in ("one", "two"):
        files(tmp_path, f"{place}/in/cats/a.mp4", f"{place}/in/b.mp4")
        ids.append([item["id"] for item in read_inputs([str(tmp_path / place / "in")])])
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '\n{"path"\n{', "line 2: not JSON .*and 1 rows like it"),
        ("a.jsonl", '{"path": "x.mp4", "start": ' + "1" * 400 + "}\n", "is no time"),
        ("a.jsonl", '{"path": "x.mp4", "start": -1}\n', "'-1' is no time"),
        ("a.jsonl", '{"path": "x.mp4", "end": 1e999}\n', "'inf' is no time"),
        ("a.jsonl", '{"path": "x.mp4", "start": 5, "end": 3}\n', "end 3 is not after its start 5"),
        ("a.jsonl", '{"path": ["x.mp4"]}\n', "'path' must be text, found list"),
        ("a.jsonl", '{"path": "ftp://x.example/a.mp4"}\n', "not ftp://"),
        ("a.jsonl", '{"path": "reference://x.png::file:///i.json"}\n', "not reference://"),
        ("a.jsonl", '{"path": "s3://b/x.mp4::file:///i"}\n', "a chain of file systems"),
        ("a.jsonl", "[1]\n", "expected an object"),
        ("a.jsonl", '{"size": 3}\n', "names no medium; it has the columns size"),
        ("a.jsonl", '{"path": "x.mp4", "start": "soon"}\n', "'soon' is no time"),
        ("a.parquet", "no", "not a readable Parquet file"),
        ("a.txt", "no", "neither a folder, a manifest"),
    ],
)
def test_mistakes_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_inputs([str(tmp_path / name)])


def test_an_added_item_changes_one_shard(tmp_path):
    items = [{"id": f"v{i}", "path": f"/none/{i}.mp4"} for i in range(200)]
    before = {shard.name: shard.key for shard in make_shards(items, 16)}
    after = {shard.name: shard.key for shard in make_shards([*items, {"id": "new", "path": "/none/new.mp4"}], 16)}
    assert len(before) > 8 and before.keys() == after.keys()
    assert sum(before[name] != after[name] for name in before) == 1


def test_a_row_that_cannot_be_read_costs_itself_and_is_not_forgotten(tmp_path):
    files(tmp_path, "a.mp4")
    deep, large = b"[" * 100_000, b'{"path": "a.mp4", "start": ' + b"9" * 5000 + b"}"
    rows = [b'{"path": "a.mp4"}', b"{", deep, large, b"7", b'{"path": "a.mp4", "caption": "caf\xe9"}']
    (tmp_path / "list.jsonl").write_bytes(b"\n".join(rows))
    items = read_inputs([str(tmp_path / "list.jsonl")])
    assert [item["path"] for item in items if "missing" not in item] == [str(tmp_path / "a.mp4")]
    told = sorted(item["missing"].partition("list.jsonl, ")[2] for item in items if "missing" in item)
    assert [text[:6] for text in told] == [f"line {n}" for n in (2, 3, 4, 5, 6)]
    assert len({item["id"] for item in items}) == 6


def test_names_that_are_not_utf8_and_halves_of_letters_are_read(tmp_path):
    name = os.fsdecode(b"caf\xe9.mp4")
    files(tmp_path, f"in/{os.fsdecode(bytes([0xE9]))}/{name}")
    (item,) = read_inputs([str(tmp_path / "in")])
    assert os.path.exists(item["path"]) and item["category"] == "\ufffd"
    rows = [{"path": item["path"], "caption": "a dog \ud83d"}, {"path": item["path"], "caption": name}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad, good = sorted(read_inputs([str(tmp_path / "list.jsonl")]), key=lambda item: item["path"])
    assert good["caption"] == "a dog ?" and os.path.exists(good["path"])
    assert bad["missing"].endswith("'caption' is not UTF-8 text")
    (tmp_path / "list.csv").write_bytes(b"path\n" + os.fsencode(item["path"]) + b"\n")
    assert os.path.exists(only(read_inputs([str(tmp_path / "list.csv")]))["path"])


@pytest.mark.parametrize("address", ["HTTP://127.0.0.1:1/a.mp4", "https://x.example/a.mp4"])
def test_the_web_is_read_only_where_that_is_asked_for(tmp_path, address):
    (tmp_path / "list.jsonl").write_text(json.dumps({"path": address}))
    assert only(read_inputs([str(tmp_path / "list.jsonl")]))["path"] == ""
    assert only(read_inputs([str(tmp_path / "list.jsonl")], fetch=True))["path"] == address
