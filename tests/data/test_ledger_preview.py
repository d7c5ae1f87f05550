"""The ledger survives being killed; a batch can be looked at."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kangaroo_jax.config import DataConfig
from kangaroo_jax.conventions import FIELDS
from kangaroo_jax.data.annotations.conversation import Conversation, Media, Turn
from kangaroo_jax.data.batches import preview
from kangaroo_jax.data.batches.ledger import Ledger
from kangaroo_jax.data.batches.loader import decode_recipes
from kangaroo_jax.data.batches.packing import Shape, assemble
from kangaroo_jax.data.batches.preview import batch_tree, save_picture
from kangaroo_jax.data.batches.sample import make_recipe
from kangaroo_jax.data.media.decode import ThreadDecoder
from kangaroo_jax.data.tokenizer import Tokenizer
from kangaroo_jax.errors import UserError


def test_one_line_a_sample_over_several_runs(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "ledger.jsonl"
    first = Ledger(path)
    assert first.add(("s", 1), "1", "/v/a.mp4", "no such file", "recipe")
    assert not first.add(("s", 1), "1", "/v/a.mp4", "no such file", "decode")
    with path.open("ab") as file:
        file.write(b'{"id": "2", "pa')  # killed while it wrote
    second = Ledger(path)
    assert second.count == 1
    assert not second.add(("s", 1), "1", "", "x", "recipe") and second.add(("s", 2), "2", "", "文件坏了", "decode")
    lines = path.read_text().splitlines()
    assert [json.loads(line)["id"] for line in (lines[0], lines[2])] == ["1", "2"]
    assert json.loads(lines[2]).keys() == {"id", "path", "reason", "stage", "time", "source", "number"}
    assert "文件坏了" in lines[2]
    assert Ledger(path).count == 2


def test_ids_that_repeat_and_lines_of_an_earlier_version(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"id": "0", "path": "a.mp4", "reason": "x", "stage": "decode", "time": 1.5}\n')
    ledger = Ledger(path)
    assert not ledger.add(("s", 0), "0", "a.mp4", "x", "decode")  # entered by that version
    assert ledger.add(("s", 1), "0", "b.mp4", "x", "decode") and ledger.add(("t", 1), "0", "b.mp4", "x", "decode")
    assert not ledger.add(("s", 1), "0", "b.mp4", "x", "decode")
    assert ledger.count == 3 == Ledger(path).count == len(path.read_text().splitlines())


def test_names_that_utf8_cannot_hold_are_entered(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.add(("s", 0), "half \ud83d", "latin-\udce9.mp4", "latin-\udce9.mp4: no such file", "recipe")
    (line,) = (tmp_path / "ledger.jsonl").read_bytes().splitlines()
    entry = json.loads(line)
    assert (entry["id"], entry["path"]) == ("half \ud83d", "latin-\udce9.mp4")


def test_ledger_without_a_file(tmp_path: Path) -> None:
    ledger = Ledger()
    assert ledger.add(("s", 1), "1", "", "", "recipe") and ledger.count == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the ledger"):
        Ledger(tmp_path / "file" / "ledger.jsonl")


def test_tree_and_picture(tokenizer: Tokenizer, data_config: DataConfig, media: Path, tmp_path: Path) -> None:
    video = Conversation(
        "v",
        (Turn("user", "<video>\nWhat moves? 什么?"), Turn("assistant", "The circle.\n红色")),
        (Media("video", str(media / "20s.mp4")),),
    )
    text = Conversation("t", (Turn("user", "Q " * 200), Turn("assistant", "A")))
    data_config = replace(data_config, max_sample_tokens=900, tokens_per_pack=900)
    recipes = [make_recipe(conversation, tokenizer, data_config, 2, 3) for conversation in (video, video, text)]
    rows = [[recipes[0], recipes[1]], [recipes[2]], []]
    clips = [decode_recipes(row, ThreadDecoder(0), 48) for row in rows]
    clips[0][1] = None  # a blanked sample
    batch = assemble(rows, clips, Shape(900, 48, 48, 2, 3))
    tree = batch_tree(batch)
    assert all(name in tree for name in FIELDS) and "[B, F, S, S, 3] = [3, 48, 48, 48, 3]" in tree
    assert "2 samples in 3 rows" in tree
    path = save_picture(batch, tokenizer, tmp_path / "x" / "first_batch.png")
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.shape[1] == 1280 and 300 < picture.shape[0] < 2000
    assert (picture == (0xC6, 0xEF, 0xCE)).all(-1).any()  # what is learnt
    no_frames = assemble([[recipes[2]]], [[[]]], Shape(900, 0, 48, 2, 3))
    assert "0 of 0 frames (none)" in batch_tree(no_frames)
    save_picture(no_frames, tokenizer, tmp_path / "text.png")


def test_what_a_font_lacks_is_written_as_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib brings a font with Cyrillic and Arabic, which has no Chinese."""
    fonts = Path(pytest.importorskip("matplotlib").get_data_path()) / "fonts" / "ttf"
    monkeypatch.setattr(preview, "_CJK_FONTS", (str(fonts / "DejaVuSans.ttf"),))
    assert preview._font(14).shown("a é кот م 红🦘\x07\u200d") == r"a é кот م \u7ea2\U0001f998\x07\u200d"
    monkeypatch.setattr(preview, "_CJK_FONTS", ())
    assert preview._font(14).shown("a 红\n") == r"a \u7ea2\n"
