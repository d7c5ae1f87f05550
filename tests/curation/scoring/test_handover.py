"""What `kangaroo curate` writes is what `kangaroo annotate` reads."""

import json

from kangaroo_jax.curation.annotate.files import read_clips
from kangaroo_jax.curation.curate import Options, curate


def test_annotate_reads_what_curate_selected_with_times_of_the_medium(clips, config, tmp_path):
    rows = [
        {"id": "whole", "path": str(clips / "clip_0.mp4"), "caption": "a square", "licence": "CC0"},
        {"id": "part", "path": str(clips / "clip_1.mp4"), "start": 1.0, "end": 2.5},
    ]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.select.min_seconds = 1.0
    curate(Options(str(tmp_path / "out"), (str(tmp_path / "raw.jsonl"),)), config)
    found = {clip.row["source_id"]: clip for clip in read_clips(tmp_path / "out/selected.jsonl")}
    assert set(found) == {"whole", "part"}
    assert (found["whole"].caption, found["whole"].licence) == ("a square", "CC0")
    assert (found["part"].start, found["part"].end) == (1.0, 2.5)
    for clip in found.values():
        times = [frame.time for frame in clip.keyframes]
        assert len(times) == 5 and times == sorted(times)
        assert clip.start <= times[0] and times[-1] <= clip.end
        assert all(open(frame.path, "rb").read(2) == b"\xff\xd8" for frame in clip.keyframes)
    assert found["part"].keyframes[-1].time > 2.0  # not counted from the clip's start
