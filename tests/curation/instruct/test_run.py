"""The whole of `kangaroo instruct` against a real socket server that knows some answers without the video."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
from ml_collections import ConfigDict

from kangaroo_jax.bench.annotate import faulty_server, statistics_of
from kangaroo_jax.curation.instruct.config import instruct_config
from kangaroo_jax.curation.instruct.run import make_instructions
from kangaroo_jax.data.batches.mixture import open_sources
from kangaroo_jax.errors import UserError
from tests.curation.rows import rows_of

# Questions that the server asks now and then, and answers without any video: what the blind check must find.
TRUTHS = {f"Which number follows {n} when one counts?": f"number {n + 1}" for n in range(40)}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """Address of a server with faults, whose questions are give-aways one time in five."""
    truths = tmp_path_factory.mktemp("truths") / "truths.json"
    truths.write_text(json.dumps(TRUTHS))
    with faulty_server("--faults=0.1", "--latency=0.005", "--hang=5", f"--truths={truths}") as url:
        yield url


def config_for(url: str, samples: int) -> ConfigDict:
    config = instruct_config("endpoint")
    config.update(samples=samples, verifier="")  # the server's answers follow from nothing
    for name, backend in config.backends.items():
        backend.update(base_url=url, model=name, timeout=3.0, first_wait=0.02, concurrency=32)
    return config


def check_set(folder: Path, config: ConfigDict, samples: int) -> list[dict]:
    """What must be true of every set."""
    records = rows_of(folder / "instruct.jsonl")
    validator = jsonschema.Draft202012Validator(json.loads((folder / "instruct_schema.json").read_text()))
    validator.check_schema(validator.schema)
    assert len(records) == samples == len({record["id"] for record in records})
    assert not [error.message for record in records for error in validator.iter_errors(record)]
    total = sum(config.shares.values())
    counts = Counter(f"{record['task']}_{record['language']}" for record in records)
    for name, share in config.shares.items():
        assert abs(counts[name] / samples - share / total) <= max(0.01, 1 / samples), name
    questions = [record for record in records if record["task"] == "mcq"]
    for record in questions:
        options, letter = record["options"], record["answer"]
        assert len(options) == 4 == len({"".join(option.lower().split()) for option in options})
        lines = record["conversations"][0]["value"].split("\n")
        assert lines[2:6] == [f"{mark}. {option}" for mark, option in zip("ABCD", options, strict=True)]
        assert record["conversations"][1]["value"] == letter
    letters = Counter(record["answer"] for record in questions)
    assert all(abs(letters[letter] / len(questions) - 0.25) <= 1 / len(questions) + 0.005 for letter in "ABCD")
    return records


def test_shares_letters_schema_and_give_aways(tmp_path, server, make_captions):
    source, config = make_captions(tmp_path, 40), config_for(server, 80)
    make_instructions(source, tmp_path / "out", config, tell=lambda line: None)
    records = check_set(tmp_path / "out", config, 80)
    captions = {row["id"]: row for row in rows_of(source)}
    for record in records:
        row = captions[record["source"]["caption"]]
        assert row["clip"] == record["source"]["clip"] and row["language"] == record["language"]
        if record["task"] == "detailed_caption":
            assert record["conversations"][1]["value"] == row["caption"]
    asked = rows_of(tmp_path / "out/instruct_dropped.jsonl") + records
    planted = [one for one in asked if one["task"] == "mcq" and any(truth in str(one) for truth in TRUTHS)]
    kept = [one for one in planted if "conversations" in one]
    assert len(planted) >= 3 and not kept
    assert {one["reason"] for one in planted} == {"answered blind"}

    before = statistics_of(server)["given"]
    config.min_score = 0.1  # another run, of the same questions
    make_instructions(source, tmp_path / "out", config, tell=lambda line: None)
    assert statistics_of(server)["given"] == before
    assert rows_of(tmp_path / "out/instruct.jsonl") == records
    lines: list[str] = []
    make_instructions(source, tmp_path / "out", config, tell=lines.append)
    assert len(lines) == 1 and "nothing to do" in lines[0]

    (opened,) = open_sources([str(tmp_path / "out/instruct.jsonl")], "")
    conversation = opened.file[0]
    assert conversation.media[0].path.endswith(".mp4") and conversation.media[0].end == 4.0
    assert conversation.language == records[0]["language"]


@pytest.mark.slow
def test_two_thousand(tmp_path, server, make_captions):
    source, config = make_captions(tmp_path, 800), config_for(server, 2000)
    make_instructions(source, tmp_path / "out", config, tell=print)
    records = check_set(tmp_path / "out", config, 2000)
    letters = Counter(record["answer"] for record in records if record["task"] == "mcq")
    assert max(letters.values()) - min(letters.values()) <= 0.02 * sum(letters.values())
    asked = rows_of(tmp_path / "out/instruct_dropped.jsonl") + records
    planted = [one for one in asked if one["task"] == "mcq" and any(truth in str(one) for truth in TRUTHS)]
    kept = [one for one in planted if "conversations" in one]
    print(len(planted), "give-aways,", len(kept), "kept", Counter(one["reason"] for one in planted))
    assert len(planted) > 100 and len(kept) <= 0.05 * len(planted)


def test_nothing_made_is_no_success_and_totals_are_true(tmp_path, make_captions):
    source, lines = make_captions(tmp_path, 3), []
    make_instructions(source, tmp_path / "out", instruct_config("captions"), tell=lines.append)
    assert lines[0].startswith("12 of 12 conversations, ")
    rows = [row for row in rows_of(source) if row["language"] == "en"]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="none of detailed_caption_zh, short_caption_zh.*keep_shares=False"):
        make_instructions(source, tmp_path / "out", instruct_config("captions"), tell=lines.append)
    rows[0].pop("short")
    source.write_text(json.dumps(rows[0]))
    with pytest.raises(UserError, match="line 1: a caption that is ok has texts"):
        make_instructions(source, tmp_path / "out", instruct_config("captions"), tell=lines.append)
