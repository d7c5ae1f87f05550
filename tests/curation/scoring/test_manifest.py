"""Readers of folders and of the manifests that public datasets come with."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kangaroo_jax.curation.manifest import read_inputs
from kangaroo_jax.curation.shards import make_shards
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
        ("a.jsonl", '{"path": "x.mp4"}\n{"path"', "line 2: not JSON"),
        ("a.jsonl", "[1]\n", "a JSON object is needed"),
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
