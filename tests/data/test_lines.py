"""Large annotation files: an index of lines, and records that are read only as they are drawn."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kangaroo_jax.config import DataConfig
from kangaroo_jax.data.annotations import readers, sources
from kangaroo_jax.data.annotations.readers import line_places
from kangaroo_jax.data.annotations.sources import AnnotationFile, evenly
from kangaroo_jax.data.batches.ledger import Ledger
from kangaroo_jax.data.batches.loader import make_loader
from kangaroo_jax.data.tokenizer import Tokenizer
from kangaroo_jax.errors import UserError

pieces = st.sampled_from([b"{}", b" {} ", b"\n", b"\n\n", b"\r\n", b" ", b"\t\n", "[é]".encode(), b"{" * 9])


@settings(deadline=None)
@given(parts=st.lists(pieces, max_size=12), block=st.integers(1, 8))
def test_lines_are_found_as_python_finds_them(parts: list[bytes], block: int) -> None:
    text = b"".join(parts)
    with tempfile.TemporaryFile() as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_BLOCK", block)
        file.write(text)
        file.seek(0)
        begins, numbers, size = line_places(file)
    lines = [(i, line) for i, line in enumerate(text.split(b"\n"), start=1)]
    wanted = [(i, line.strip()) for i, line in lines if line.strip()]
    ends = [*begins, size][1:]
    got = [text[begin:end].strip() for begin, end in zip(begins, ends, strict=True)]
    assert list(zip(range(1, len(begins) + 1) if numbers is None else numbers, got, strict=True)) == wanted
    assert size == len(text)


def test_some_of_many_are_chosen_evenly() -> None:
    assert evenly(5, 5) == [0, 1, 2, 3, 4] and evenly(0, 3) == []
    assert evenly(1000, 4) == [0, 333, 666, 999]


def records(path: Path, count: int, bad: int) -> Path:
    """Text samples in lines of which every second is empty; record `bad` is cut off."""
    lines = []
    for i in range(count):
        talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": f"number {i}"}]
        line = json.dumps({"id": f"s{i}", "conversations": talk})
        lines.append(line[:-4] if i == bad else line)
    path.write_text("\n\n".join(lines))
    return path


def test_a_mistake_that_is_checked_stops_at_once_and_another_goes_to_the_ledger(
    tmp_path: Path, data_config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = records(tmp_path / "train.jsonl", 41, bad=7)
    with pytest.raises(UserError, match="train.jsonl, line 15: not JSON"):
        AnnotationFile(path)
    monkeypatch.setattr(sources, "CHECKED", 5)  # records 0, 10, 20, 30 and 40
    file = AnnotationFile(path)
    assert len(file) == 41 and "41 samples" in file.describe() and "5 of them" in file.describe()
    with pytest.raises(UserError, match="train.jsonl, line 15: not JSON"):
        file[7]
    data_config = replace(
        data_config, train=(str(path),), packing_bins=0, packs_per_batch=1, max_frames=0, frames_per_pack=0
    )
    ledger = Ledger(tmp_path / "ledger.jsonl")
    loader = make_loader(data_config, tokenizer, frames_per_group=2, tokens_per_group=3, seed=1, ledger=ledger)
    seen = [next(loader)[1].sample_ids[0] for _ in range(80)]
    loader.close()
    assert sorted(seen) == sorted([f"s{i}" for i in range(41) if i != 7] * 2)
    (entry,) = map(json.loads, (tmp_path / "ledger.jsonl").read_text().splitlines())
    assert "train.jsonl, line 15: not JSON" in entry["reason"] and entry["stage"] == "recipe"
    data_config = replace(data_config, strict=True)
    strict = make_loader(data_config, tokenizer, frames_per_group=2, tokens_per_group=3, seed=1, ledger=Ledger())
    with pytest.raises(UserError, match="line 15: not JSON"):
        for _ in range(41):
            next(strict)
    strict.close()
