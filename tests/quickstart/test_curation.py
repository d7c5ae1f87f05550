"""Raw clips of the quickstart: what is planted, what is dropped, and what training reads."""

import json

import av
import pytest

from kangaroo_jax.corpus.bad_clips import COPY_SIDE, KINDS, SIZE, read_clip, write_raw_clips
from kangaroo_jax.corpus.make import make_corpus, read_records, scenes_of
from kangaroo_jax.quickstart import curation as quickstart_curation
from kangaroo_jax.quickstart.curation import Curated, curate_corpus, report_section, training_data


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus of fifteen short clips."""
    return make_corpus(tmp_path_factory.mktemp("quickstart") / "corpus", 0, 0.005, processes=1, tell=lambda line: None)


def test_every_kind_is_a_file_of_its_own_and_the_manifest_does_not_tell(corpus, tmp_path):
    scenes = scenes_of(corpus.folder)
    good = [(corpus.folder / name, scenes[name]) for name in sorted(scenes) if name.startswith("media/short/")]
    raw = write_raw_clips(tmp_path, good[:4], 10, seed=1)
    kinds = [path.stem.partition("_")[0] for path in raw.planted]
    assert sorted(kinds) == sorted([*KINDS] * 2)
    for path, kind in zip(raw.planted, kinds, strict=True):
        if kind == "broken":
            with pytest.raises(av.error.FFmpegError):
                read_clip(path)
        else:
            pictures, _ = read_clip(path)
            assert pictures[0].shape == ((COPY_SIDE, COPY_SIDE, 3) if kind == "copy" else (SIZE[1], SIZE[0], 3))
    rows = read_records(raw.manifest)
    assert {row["path"] for row in rows} == {str(path) for path in (*raw.good, *raw.planted)}
    assert all(set(row) == {"path", "caption"} for row in rows)
    again = write_raw_clips(tmp_path / "again", good[:4], 10, seed=1)
    assert [a.read_bytes() for a in raw.planted] == [b.read_bytes() for b in again.planted]


def test_training_reads_what_was_kept(corpus, tmp_path):
    planted = {"raw/media/text_0.mp4": "text", "raw/media/face_0.mp4": "face"}
    right = Curated(tmp_path, (), dict(planted), planted, 1.0)
    assert not right.wrong and training_data(corpus, right) == corpus.folder == training_data(corpus, None)
    # One of the corpus is dropped by mistake, and one that was planted is kept.
    dropped = corpus.folder / "media/short/00003.mp4"
    wrong = Curated(tmp_path, (), {str(dropped): "motion", "raw/media/text_0.mp4": "text"}, planted, 1.0)
    assert set(wrong.wrong) == {str(dropped), "raw/media/face_0.mp4"}
    folder = training_data(corpus, wrong)
    assert (folder / corpus.warmup.name).read_text() == corpus.warmup.read_text()
    for path in corpus.stages:
        media = {record.get("video") for record in read_records(folder / path.name)}
        before = {record.get("video") for record in read_records(path)}
        after = {str(corpus.folder / name) for name in before - {"media/short/00003.mp4"} if name}
        added = {str(tmp_path / "raw/media/face_0.mp4")} if path.name == "stage2.jsonl" else set()
        assert media - {None} == after | added


def test_without_the_extra_a_line_says_so(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart_curation, "NEEDS", ("a_package_that_is_not_there",))
    lines: list[str] = []
    assert curate_corpus(corpus, tmp_path, tell=lines.append) is None
    assert "a_package_that_is_not_there" in lines[0] and "[curation]'" in lines[0]


@pytest.mark.slow
def test_the_planted_clips_are_dropped_by_their_rules_and_no_other(corpus, tmp_path):
    if quickstart_curation.missing():
        pytest.skip("of the extra `curation`")
    lines: list[str] = []
    found = curate_corpus(corpus, tmp_path / "curation", scale=0.1, tell=lines.append)
    assert found is not None and not found.wrong
    assert set(found.dropped.values()) == {rule for rule, _ in KINDS.values()} and len(found.planted) == 10
    assert len(found.kept) == 10 and all("corpus/media/short/" in path for path in found.kept)
    section = report_section(found)
    assert section.count("<img") == 2 * 4 and "20 of 20 were judged as planted" in section
    state = json.loads((tmp_path / "curation/curated.json").read_text())
    assert curate_corpus(corpus, tmp_path / "curation", scale=0.1, tell=lines.append) == found
    assert state == json.loads((tmp_path / "curation/curated.json").read_text()) and lines[0] == lines[1]
