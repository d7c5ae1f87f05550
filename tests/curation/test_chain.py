"""From raw clips to a batch: curate, annotate, instruct, export and the loader, each by its command."""

import collections
import json
from collections.abc import Set
from pathlib import Path

import pytest

from kangaroo_jax.cli import main as cli
from kangaroo_jax.config import DataConfig, stage_config
from kangaroo_jax.corpus.make import Corpus, CorpusMixture, make_corpus, scenes_of
from kangaroo_jax.corpus.records import media_name
from kangaroo_jax.corpus.text import dense_caption
from kangaroo_jax.data.annotations.sources import AnnotationFile
from kangaroo_jax.data.batches.ledger import Ledger
from kangaroo_jax.data.batches.loader import make_loader
from kangaroo_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from tests.curation.rows import rows_of

SHORTS = 12
TINY = CorpusMixture(
    **dict.fromkeys(("images", "longs", "held_images", "held_shorts", "held_longs"), 1),
    **dict.fromkeys(("stage1_captions", "stage1_more", "some_images", "some_text", "stage5_again"), 1),
    shorts=SHORTS,
    warmup=0.001,
    eval_image=(8, 8),
    eval_short=(8, 8),
    eval_long=(8, 8),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("chain") / "corpus"
    return make_corpus(folder, seed=5, mixture=TINY, processes=1, tell=lambda line: None)


def kangaroo(*arguments: str) -> None:
    """Run a job of the command line."""
    assert cli.main(list(arguments)) == 0


def test_what_is_curated_is_captioned_asked_about_exported_and_loaded(corpus, tmp_path):
    out, raw = tmp_path / "out", tmp_path / "raw.jsonl"
    clips = [str(corpus.folder / media_name("short", i)) for i in range(SHORTS)]
    (tmp_path / "broken.mp4").write_bytes(Path(clips[0]).read_bytes()[:700])
    raw.write_text("".join(json.dumps({"path": path}) + "\n" for path in [*clips, str(tmp_path / "broken.mp4")]))
    off = [f"--config.{stage}.enabled=False" for stage in ("text", "face", "caption_language")]
    keep = ["--config.select.min_short_side=64", "--config.select.min_motion=0.0", "--config.select.duplicates=False"]
    here = [f"--output={out}", "--config.engine.workers=1", *off, *keep, "--config.select.min_seconds=1.5"]
    kangaroo("curate", f"--input={raw}", *here)
    kept = {row["id"]: row for row in rows_of(out / "selected.jsonl")}
    assert {row["media"] for row in kept.values()} == set(clips)
    assert [row["rule"] for row in rows_of(out / "dropped.jsonl")] == ["broken"]

    truth = [f"--config.backends.{name}.corpus={corpus.folder}" for name in ("captioner_a", "captioner_b")]
    truth += [f"--config.backends.{name}.corpus={corpus.folder}" for name in ("captioner_c", "writer")]
    kangaroo("annotate", f"--input={out / 'selected.jsonl'}", "--config=annotation:corpus", *truth)
    scenes = {str(corpus.folder / name): scene for name, scene in scenes_of(corpus.folder).items()}
    captions = [row for row in rows_of(out / "captions.jsonl") if row["outcome"] == "ok"]
    assert {row["clip"] for row in captions} == set(kept)
    told = collections.Counter()
    for row in captions:
        right = row["caption"] == dense_caption(scenes[kept[row["clip"]]["media"]], row["language"])
        told[row["language"], right] += 1
    assert told["en", True] >= 10 and told["zh", True] >= 10

    ask = [f"--config.backends.{name}.corpus={corpus.folder}" for name in ("writer", "blind")]
    kangaroo("instruct", f"--input={out / 'captions.jsonl'}", "--config=instruct:corpus", "--config.samples=24", *ask)
    records = rows_of(out / "instruct.jsonl")
    assert len({record["task"] for record in records}) >= 4 and len(records) >= 12

    kangaroo("curate", "export", *here, f"--annotations={out / 'instruct.jsonl'}", "--name=chain")
    built = AnnotationFile(out / "export/chain/1.0.0")
    turns = {built[i].id: [turn.text for turn in built[i].turns] for i in range(len(built))}
    assert turns.keys() == {record["id"] for record in records}
    for record in records:
        said = [turn["value"] for turn in record["conversations"]]
        assert [text.removeprefix("<video>\n") for text in turns[record["id"]]] == [
            text.removeprefix("<video>\n") for text in said
        ]
    load(out / "export/chain/1.0.0", tmp_path, turns.keys())


def load(dataset: Path, folder: Path, names: Set[str]) -> None:
    """Every sample of the dataset comes out of the loader, with pictures in it."""
    data = stage_config("tiny").data
    data.update(train=(str(dataset),), min_frames=4, max_frames=8, image_size=16)
    data.update(tokens_per_pack=512, frames_per_pack=24, packs_per_batch=2, packing_bins=3, cache_mib=0)
    texts = ["user assistant system What moves first? The red circle moves left. 红色的圆形向左移动。 0123456789"] * 40
    tokenizer = load_tokenizer(train_sentencepiece(texts, folder / "t.model", 330))
    ledger, seen = Ledger(), set[str]()
    loader = make_loader(
        DataConfig.from_config(data),
        tokenizer,
        frames_per_group=1,
        tokens_per_group=4,
        seed=0,
        ledger=ledger,
        num_threads=0,
    )
    for _ in range(4 * len(names)):
        batch, stats = next(loader)
        seen.update(stats.sample_ids)
        assert (batch.vision_index >= 0).any() and (batch.weights > 0).any()
        assert batch.frames[batch.frame_groups > 0].std() > 5
        if seen == names:
            break
    loader.close()
    assert seen == names and ledger.count == 0
