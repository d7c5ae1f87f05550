"""`kangaroo data build`: the same bytes however often it is interrupted, read by TFDS, Grain and the loader."""

import subprocess
import sys
from pathlib import Path

import pytest

from kangaroo_jax.data.annotations import dataset
from kangaroo_jax.data.annotations.conversation import Conversation, Media, Turn
from kangaroo_jax.data.annotations.dataset import DatasetPlan, write_dataset
from kangaroo_jax.data.annotations.sources import AnnotationFile
from kangaroo_jax.data.media.image import load_image
from kangaroo_jax.data.media.video import load_video, probe
from kangaroo_jax.errors import UserError
from tests.data.media import read_number

pytest.importorskip("tensorflow_datasets")
array_record_module = pytest.importorskip("array_record.python.array_record_module")


@pytest.fixture
def conversations(media: Path) -> list[Conversation]:
    """Text alone, a clip of a video, an image beside a video."""
    turns = (Turn("user", "<video>\nQ"), Turn("assistant", "答", 0.5))
    video = Media("video", str(media / "5s.mp4"), start=1.0, fps=2.0)
    both = (Turn("user", "<video>\n<image>\nQ"), Turn("assistant", "A"))
    return [
        Conversation("a", (Turn("user", "Q"), Turn("assistant", "A")), (), "en"),
        Conversation("b", turns, (video,)),
        Conversation("c", both, (Media("video", str(media / "2s.mp4")), Media("image", str(media / "photo.jpg")))),
    ] * 3


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_embedded_media_are_read_back(tmp_path: Path, conversations: list[Conversation]) -> None:
    lines: list[str] = []
    folder = write_dataset(DatasetPlan("set", tmp_path, True, 4), conversations, "x", tell=lines.append)
    assert len(lines) == 3 and "ETA" in lines[0]
    file = AnnotationFile(folder)
    assert len(file) == 9 and "kangaroo data build" in file.describe()
    for i, expected in enumerate(conversations):
        found = file[i]
        assert (found.id, found.turns, found.language) == (expected.id, expected.turns, expected.language)
        for medium, original in zip(found.media, expected.media, strict=True):
            assert (medium.kind, medium.start, medium.fps) == (original.kind, original.start, original.fps)
    video = file[7].media[0].path
    assert probe(video).seconds == pytest.approx(5.0)
    assert [read_number(x) for x in load_video(video, image_size=48, times=[1.0, 2.0]).pixels] == [4, 8]
    assert read_number(load_image(file[8].media[1].path, 48)) == 9


def test_an_interrupted_build_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, conversations: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_dataset(DatasetPlan("set", tmp_path / "a", False, 2), conversations, "x", tell=lambda _: None)
    original, calls = dataset.encode, []

    def fails_once(*args: object) -> bytes:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args)

    plan = DatasetPlan("set", tmp_path / "b", False, 2)
    monkeypatch.setattr(dataset, "encode", fails_once)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(plan, conversations, "x", tell=lambda _: None)
    assert [f.name for f in plan.folder.iterdir() if "array_record" in f.name] == [plan.shard(0, 5).name]
    again = write_dataset(plan, conversations, "x", tell=lambda _: None)
    assert files_of(again) == files_of(whole)
    assert len(calls) == 4 + 7  # the first shard is not written again
    with pytest.raises(UserError, match="was begun with another source"):
        write_dataset(plan, conversations, "y", tell=lambda _: None)


def test_a_record_has_its_features_in_the_order_of_their_names(conversations: list[Conversation]) -> None:
    """A map of Protocol Buffers has another order in each process."""
    features = ["id", "language", "media/data", "media/frames", "media/kind", "media/options", "media/path"]
    features += ["turns/loss", "turns/role", "turns/text"]
    record = dataset.encode(dataset.features(), conversations[0], False)
    places = [record.index(bytes([10, len(name), *name.encode()])) for name in features]
    assert places == sorted(places)


SCRIPT = """
import sys
import tensorflow_datasets as tfds
source = tfds.data_source("set", split="train", data_dir=sys.argv[1])
row = source[1]
assert len(source) == 9 and row["id"] == b"b" and row["turns"]["text"][1].decode() == "\u7b54", row
assert tfds.builder("set", data_dir=sys.argv[1]).info.splits["train"].num_examples == 9
import grain
assert grain.MapDataset.source(source)[10]["id"] == b"b"
assert not any(name.split(".")[0] == "tensorflow" for name in sys.modules)
"""


def test_tfds_finds_it_by_name_without_tensorflow(tmp_path: Path, conversations: list[Conversation]) -> None:
    write_dataset(DatasetPlan("set", tmp_path, False, 4), conversations, "x", tell=lambda _: None)
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], check=True, timeout=120)


def test_a_full_disk_leaves_no_half_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(array_record_module.ArrayRecordWriter):
        def close(self) -> None:
            super().close()
            raise RuntimeError("write() failed: No space left on device; writing x; at byte 1044480")

    with pytest.raises(ZeroDivisionError):
        dataset.write_records(tmp_path / "set", (bytes(1 // k) for k in (1, 0)))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(OSError, match="No space left on device.*set"):
        dataset.write_records(tmp_path / "set", iter([b"record"]))
    assert not list(tmp_path.iterdir())
