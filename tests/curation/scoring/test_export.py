"""What is exported is read by the loader's reader, Grain and tfds, and shows the pictures that it should."""

import json
import shutil

import numpy as np
import pytest

from kangaroo_jax.curation.curate import Options, curate
from kangaroo_jax.curation.curate import export as run_export
from kangaroo_jax.curation.export import cut_clip
from kangaroo_jax.data.annotations.sources import AnnotationFile
from kangaroo_jax.data.media.containers import member_of
from kangaroo_jax.data.media.video import load_media, load_video
from kangaroo_jax.errors import UserError
from tests.curation.rows import rows_of
from tests.curation.scoring.clips import moving, write_clip


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Two captioned videos; of the second, two clips of its second half."""
    folder = tmp_path_factory.mktemp("captioned")
    write_clip(folder / "a.mp4", moving(1))
    write_clip(folder / "b.mp4", moving(2, 48) + moving(3, 48), g="12")
    rows = [
        {"path": "a.mp4", "caption": "a red square", "language": "en", "license": "CC0", "category": "x"},
        {"path": "b.mp4", "caption": "蓝色的方块", "language": "zh", "start": 6.4, "end": 9.0},
        {"path": "b.mp4", "caption": "a cloud", "language": "en", "start": 1.0, "end": 4.0},
    ]
    path = folder / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("media", ["embed", "reference", "keyframes"])
def test_the_export_is_read_by_what_reads_data(manifest, config, tmp_path, media):
    run = Options(str(tmp_path / "out"), (str(manifest),), name="set")
    curate(run, config)
    config.export.media = media
    run_export(run, config)
    built = AnnotationFile(tmp_path / "out/export/set/1.0.0")
    listed = AnnotationFile(tmp_path / "out/export/set.jsonl")
    assert len(built) == len(listed) == 3
    by_caption = {}
    for source in (built, listed):
        for i in range(3):
            one = source[i]
            (medium,) = one.media
            assert (media == "embed" and source is built) == (member_of(medium.path) is not None)
            by_caption.setdefault(one.turns[-1].text, []).append((one.language, medium))
    assert sorted(by_caption) == ["a cloud", "a red square", "蓝色的方块"]
    assert [language for language, _ in by_caption["蓝色的方块"]] == ["zh", "zh"]
    if media == "keyframes":
        assert all(len(medium.frames) == 5 for _, medium in by_caption["a cloud"])
        return
    wanted = load_video(manifest.parent / "b.mp4", image_size=64, times=[0.3, 1.5], start=6.4).pixels
    for _, medium in by_caption["蓝色的方块"]:
        seen = load_media(medium.path, "video", image_size=64, times=[0.3, 1.5], start=medium.start).pixels
        assert np.abs(seen.astype(int) - wanted).mean() < 1
    card = (tmp_path / "out/export/set.md").read_text()
    assert "| list | CC0 | 1 |" in card and "| max_text | 0.15 |" in card


def test_tfds_and_grain_read_it(manifest, config, tmp_path):
    import grain
    import tensorflow_datasets as tfds

    run = Options(str(tmp_path / "out"), (str(manifest),), name="set")
    curate(run, config)
    run_export(run, config)
    source = tfds.builder_from_directory(str(tmp_path / "out/export/set/1.0.0")).as_data_source("train")
    captions = [list(example["turns"]["text"])[-1] for example in grain.MapDataset.source(source)]
    assert sorted(text.decode() for text in captions) == ["a cloud", "a red square", "蓝色的方块"]


def test_a_cut_clip_has_the_pictures_of_the_file(manifest, tmp_path):
    video = manifest.parent / "b.mp4"
    path, offset = cut_clip(str(video), 5.2, 8.0, tmp_path, "cut")
    assert 0 <= offset <= 5.2 and path.stat().st_size < 0.8 * video.stat().st_size
    times = np.array([0.0, 0.7, 2.6])
    ours = load_video(path, image_size=64, times=times, start=5.2 - offset)
    theirs = load_video(video, image_size=64, times=times, start=5.2)
    np.testing.assert_allclose(ours.times, theirs.times, atol=2e-3)
    assert np.abs(ours.pixels.astype(int) - theirs.pixels).max() <= 1


def test_nothing_to_export_is_said(clips, config, tmp_path, capsys):
    run = Options(str(tmp_path / "out"), (str(clips),), name="set")
    with pytest.raises(UserError, match="no scores here"):
        run_export(run, config)
    assert not (tmp_path / "out").exists()
    curate(run, config)
    with pytest.raises(UserError, match="no conversation about a clip that was kept. Run kangaroo annotate.* instruct"):
        run_export(run, config)
    kept = rows_of(tmp_path / "out/selected.jsonl")
    rows = [
        {"id": f"{row['id']}-en", "clip": row["id"], "language": "en", "outcome": "error", "reason": "timeout"}
        | {key: row[key] for key in ("media", "start", "end")}
        for row in kept
    ]
    for row in rows[1:]:
        row |= {"outcome": "ok", "caption": "a cloud"}
    rows[-1] |= {"outcome": "error"}  # too short: its caption is there, and no good
    (tmp_path / "out/captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_export(run, config)
    told = capsys.readouterr().out
    assert "conversations of" in told and "out/captions.jsonl; --annotations=FILE takes others" in told
    assert "export: 4 conversations about 4 of 6 kept clips" in told
    with pytest.raises(UserError, match="selected.jsonl has no conversation"):  # the captions of the input
        run_export(Options(run.output, name="set", annotations=str(tmp_path / "out/selected.jsonl")), config)


def test_a_medium_that_is_gone_costs_its_conversations(clips, config, tmp_path, capsys):
    media = tmp_path / "media"
    shutil.copytree(clips, media)
    rows = [{"path": str(media / f"clip_{k}.mp4"), "caption": f"clip {k}"} for k in range(2)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Options(str(tmp_path / "out"), (str(tmp_path / "list.jsonl"),), name="set")
    curate(run, config)
    (media / "clip_0.mp4").unlink()
    run_export(run, config)
    assert "1 conversations have a medium that cannot be read" in capsys.readouterr().out
    (media / "clip_1.mp4").unlink()
    with pytest.raises(UserError, match="all 2 conversations have a medium that cannot be read.*no such file"):
        run_export(run, config)


def test_a_dataset_of_other_conversations_is_refused_and_stays_whole(manifest, config, tmp_path):
    run = Options(str(tmp_path / "out"), (str(manifest),), name="set")
    curate(run, config)
    run_export(run, config)
    before = (tmp_path / "out/export/set.jsonl").read_bytes()
    row = json.loads((tmp_path / "out/selected.jsonl").read_text().splitlines()[0])
    row |= {"clip": row["id"], "outcome": "ok", "caption": "another"}
    (tmp_path / "out/captions.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="set"):
        run_export(run, config)
    assert (tmp_path / "out/export/set.jsonl").read_bytes() == before
