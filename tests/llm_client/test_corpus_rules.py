"""The backend of rules tells the truth of a generated corpus, also of parts of its videos."""

import json
from pathlib import Path

import pytest

from kangaroo_jax.cli import main as cli
from kangaroo_jax.corpus.make import CorpusMixture, make_corpus, read_records, scenes_of
from kangaroo_jax.corpus.text import caption, dense_caption, facts
from kangaroo_jax.errors import UserError
from kangaroo_jax.llm_client.corpus_rules import SceneRules, part_of

TINY = CorpusMixture(
    **dict.fromkeys(("images", "longs", "held_images", "held_shorts", "held_longs"), 1),
    **dict.fromkeys(("stage1_captions", "stage1_more", "some_images", "some_text", "stage5_again"), 1),
    shorts=8,
    warmup=0.001,
    eval_image=(8, 8),
    eval_short=(8, 8),
    eval_long=(8, 8),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A corpus of a dozen videos beside selected.jsonl, whose clips are its videos without key frames' pixels."""
    folder = tmp_path_factory.mktemp("scenes")
    make_corpus(folder / "corpus", seed=3, mixture=TINY, processes=1, tell=lambda line: None)
    (folder / "frame.jpg").write_bytes(b"\xff\xd8rules read no pixels")
    rows = []
    for name, scene in scenes_of(folder / "corpus").items():
        if name.startswith(("media/short", "media/long")):
            frames = [{"path": "frame.jpg", "time": scene.seconds * (k + 0.5) / 5} for k in range(5)]
            row = {"id": name.replace("/", "_"), "media": f"corpus/{name}", "keyframes": frames}
            rows.append(row | {"start": 0.0, "end": scene.seconds, "category": scene.kind})
    (folder / "selected.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_scenes_are_those_that_the_corpus_was_made_of(corpus):
    scenes = scenes_of(corpus / "corpus")
    told = {}
    for record in read_records(corpus / "corpus/stage2.jsonl"):
        if "-dense-" in record["id"]:
            told[record["video"], record["id"][-2:]] = record["conversations"][1]["value"]
    assert len(told) >= 16
    assert all(dense_caption(scenes[media], language) == text for (media, language), text in told.items())
    with pytest.raises(UserError, match="no generated corpus"):
        SceneRules("rules", str(corpus))


def test_part_of_a_scene(corpus):
    scenes = scenes_of(corpus / "corpus")
    order = next(scene for scene in scenes.values() if scene.kind == "order")
    cut = order.events[0].end
    first, rest = part_of(order, 0.0, cut), part_of(order, cut, order.seconds)
    assert first.kind == "still" and caption(first, "en") == caption(order, "en").split(", then ")[0]
    assert rest.events[0].thing == order.events[1].thing and rest.events[0].start == 0
    assert part_of(order, 0.0, order.seconds + 0.04) == order and part_of(order, None, None) == order
    assert facts(first) and first.seconds == cut


def test_from_clips_to_a_checked_instruction_set(corpus, tmp_path, capsys):
    """The commands that a user types: annotate, instruct, data check."""
    names = ("captioner_a", "captioner_b", "captioner_c", "writer")
    backends = [f"--config.backends.{name}.corpus={corpus / 'corpus'}" for name in names]
    command = ["annotate", f"--input={corpus / 'selected.jsonl'}", f"--output={tmp_path}", "--config=annotation:corpus"]
    assert cli.main([*command, *backends, "--dry-run"]) == 0 and not list(tmp_path.iterdir())
    assert "together" in capsys.readouterr().out
    assert cli.main([*command, *backends, "--config.choose.share=1.0"]) == 0
    rows = read_records(tmp_path / "refined.jsonl")
    scenes = scenes_of(corpus / "corpus")
    assert len(rows) == 24
    for row in rows:
        scene = scenes[row["media"].partition("corpus/")[2]]
        assert row["outcome"] == "ok" and row["short"] == caption(scene, row["language"])

    command = ["instruct", f"--input={tmp_path / 'refined.jsonl'}", "--config=instruct:corpus"]
    checks = ["--config.verifier=writer", "--config.blind=blind", f"--config.backends.blind.corpus={corpus / 'corpus'}"]
    assert cli.main([*command, backends[-1], *checks, "--config.samples=40"]) == 0
    summary = json.loads((tmp_path / "instruct.json").read_text())
    assert summary["conversations"] >= 30 and set(summary["languages"]) == {"en", "zh"}
    for record in read_records(tmp_path / "instruct.jsonl"):
        if record["task"] == "mcq":  # asked blind in four orders, and of one who knows
            assert record["source"]["checks"] == {"blind_asked": 4, "verified": True} | {
                "blind_right": record["source"]["checks"]["blind_right"]
            }
        if record["task"] == "mcq" and record["types"] == ["attribute"]:
            colour = record["options"]["ABCD".index(record["answer"])]
            assert colour in next(row["caption"] for row in rows if row["id"] == record["source"]["caption"])
    report = f"--report={tmp_path / 'check.jsonl'}"
    assert cli.main(["data", "check", str(tmp_path / "instruct.jsonl"), report]) == 0
    assert "0 bad" in capsys.readouterr().out
