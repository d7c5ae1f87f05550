"""Shares, repeats and parts of sources; a global order; weights that change on the way."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kangaroo_jax.config import DataConfig
from kangaroo_jax.data.batches.ledger import Ledger
from kangaroo_jax.data.batches.loader import Loader, make_loader, merge_states
from kangaroo_jax.data.batches.mixture import Lane, Mixture, open_sources
from kangaroo_jax.data.tokenizer import Tokenizer
from kangaroo_jax.errors import UserError

COUNTS = {"a": 40, "b": 10, "c": 25}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Text-only sources; c answers in Chinese."""
    paths = {}
    for name, count in COUNTS.items():
        answer = "红色的圆形" if name == "c" else "a circle"
        talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": answer}]
        lines = [json.dumps({"id": f"{name}{i}", "conversations": talk}) for i in range(count)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(lines))
        paths[name] = str(path)
    return paths


def drawn(mixture: Mixture, places: int) -> list[list[tuple[int, int]]]:
    return [[lane.at(k) for k in range(places)] for lane in (Lane(mixture, v) for v in range(mixture.lanes))]


def test_shares_repeats_and_parts(files: dict[str, str]) -> None:
    sources = open_sources([files["a"] + "%50", files["b"] + "%300", files["c"] + "%140"], "", weights=[1, 1, 2])
    assert [source.count for source in sources] == [20, 30, 35]
    mixture = Mixture(sources, 5, 4)
    lanes = drawn(mixture, 256)
    for lane in lanes:  # exact in each block of each lane
        assert Counter(source for source, _ in lane) == {0: 64, 1: 64, 2: 128}
    seen = [Counter(n for lane in lanes for s, n in lane if s == source) for source in range(3)]
    assert len(seen[0]) == 20 and len(seen[1]) == 10 and len(seen[2]) == 25
    # An epoch of c has ten of its samples twice, and every sample of an epoch comes before the next begins.
    firsts = Counter(mixture.sample_index(k % 4, 2, k // 4)[1] for k in range(35))
    assert sorted(firsts.values()) == [1] * 15 + [2] * 10
    again = Counter(mixture.sample_index(k % 4, 2, k // 4)[1] for k in range(35, 70))
    assert again == firsts
    assert drawn(Mixture(sources, 5, 4), 256) == lanes != drawn(Mixture(sources, 6, 4), 256)


def test_without_weights_sources_are_drawn_by_size(files: dict[str, str]) -> None:
    mixture = Mixture(open_sources(list(files.values()), ""), 0, 1)
    counts = Counter(source for source, _ in drawn(mixture, int(mixture.counts.sum()))[0])
    np.testing.assert_allclose(
        [counts[i] / sum(counts.values()) for i in range(3)], np.array([40, 10, 25]) / 75, rtol=0.003
    )


def test_the_order_is_global(files: dict[str, str]) -> None:
    """No window: where a sample stands in the file says nothing of where it comes in the epoch."""
    mixture = Mixture(open_sources([files["a"]], ""), 1, 1)
    order = [mixture.sample_index(0, 0, k)[1] for k in range(40)]
    assert sorted(order) == list(range(40)) and abs(np.corrcoef(order, range(40))[0, 1]) < 0.5
    assert max(abs(a - b) for a, b in enumerate(order)) > 20


def test_without_a_shuffle_lanes_take_turns_on_the_files(files: dict[str, str]) -> None:
    sources = open_sources([files["a"] + "%50", files["b"] + "%200", files["c"]], "")
    mixture = Mixture(sources, 0, 3, shuffle=False)
    with pytest.warns(UserWarning, match="all 65 samples were used: they begin again"):
        lanes = drawn(mixture, 50)
    order = [lanes[k % 3][k // 3] for k in range(150)]
    epoch = [*((0, 2 * i) for i in range(20)), *((1, i % 10) for i in range(20)), *((2, i) for i in range(25))]
    assert order == (epoch * 3)[:150]
    with pytest.raises(UserError, match="shuffle is False, .* drop their weights"):
        Mixture(open_sources(list(files.values()), "", weights=[1, 1, 1]), 0, 1, shuffle=False)


@pytest.mark.parametrize("bins", [0, 1, 2])
def test_without_a_shuffle_each_batch_is_a_stretch_of_the_file(
    data_config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, bins: int
) -> None:
    """Rows of unlike samples, over more than one epoch, with a restart on two hosts on the way."""
    count, rows = 400, 4
    with (tmp_path / "file.jsonl").open("w") as file:
        for i, words in enumerate(np.random.default_rng(0).integers(1, 9, count).tolist()):
            talk = [{"from": "human", "value": "What?" * words}, {"from": "gpt", "value": "red"}]
            file.write(json.dumps({"id": str(i), "conversations": talk}) + "\n")
    data_config = replace(data_config, train=(str(tmp_path / "file.jsonl"),), shuffle=False, packing_bins=bins)
    data_config = replace(data_config, packs_per_batch=rows, frames_per_pack=0, tokens_per_pack=128)
    batches: list[list[int]] = []
    loaders = [loader_of(data_config, tokenizer)]
    while sum(map(len, batches)) < 1.5 * count:
        batches.append([int(name) for loader in loaders for name in next(loader)[1].sample_ids])
        if len(batches) == 20:
            state = loaders.pop().get_state()
            loaders = [loader_of(data_config, tokenizer, host, 2) for host in range(2)]
            for loader in loaders:
                loader.set_state(state)
    for loader in loaders:
        loader.close()
    done = np.cumsum([0, *map(len, batches)])
    for batch, start in zip(batches, done, strict=False):  # sample 0 follows sample 399
        distance = [abs((number - start + count // 2) % count - count // 2) for number in batch]
        assert np.median(distance) <= 1.5 * (bins + 1) * done[-1] / len(batches) < count / 4
    assert {number for batch in batches for number in batch} == set(range(count))
    if bins == 0:
        assert [number for batch in batches for number in batch] == [i % count for i in range(done[-1])]


def test_registries(tmp_path: Path, files: dict[str, str]) -> None:
    qwen = {"one": {"annotation_path": files["a"], "data_path": "/media", "weight": 3}}
    qwen["two"] = {"annotation_path": files["b"], "data_path": "", "weight": 1, "repeats": 2}
    (tmp_path / "registry.json").write_text(json.dumps(qwen))
    sources = open_sources(["one%50", "two"], "", str(tmp_path / "registry.json"))
    assert [(s.name, s.count, s.weight) for s in sources] == [("one", 20, 3.0), ("two", 20, 1.0)]
    row = {"file_name": "a.jsonl", "formatting": "sharegpt", "columns": {"messages": "conversations"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": row, "y": row | {"file_name": "b.jsonl"}}))
    both = open_sources([str(tmp_path / "dataset_info.json")], "")
    assert [(s.name, s.count) for s in both] == [("x", 40), ("y", 10)] and both[0].file.formats == {"llama_factory": 40}
    (tmp_path / "hub.json").write_text(json.dumps({"z": {"hf_hub_url": "who/what"}}))
    for train, words in ((["hub.json"], "expected|must be|not"), (["one%0"], "takes nothing"), ([], "is empty")):
        with pytest.raises(UserError, match=words):
            open_sources(train, "", str(tmp_path / "registry.json"))
    with pytest.raises(UserError, match="'z' is a hf_hub_url; download it"):
        open_sources(["z"], "", str(tmp_path / "hub.json"))
    with pytest.raises(UserError, match="2 values for 1 sources"):
        open_sources([files["a"]], "", weights=[1, 2])
    with pytest.raises(UserError, match="must not be negative"):
        Mixture(open_sources([files["a"], files["b"]], "", weights=[1, -1]), 0, 1)


def loader_of(config: DataConfig, tokenizer: Tokenizer, host: int = 0, hosts: int = 1) -> Loader:
    return make_loader(
        config, tokenizer, frames_per_group=2, tokens_per_group=3, seed=5, ledger=Ledger(), num_threads=0,
        rows=range(host * config.packs_per_batch // hosts, (host + 1) * config.packs_per_batch // hosts),
    )  # fmt: skip


def test_counts_and_weights_changed_on_the_way(
    data_config: DataConfig, tokenizer: Tokenizer, files: dict[str, str]
) -> None:
    data_config = replace(
        data_config, train=(files["a"], files["b"], files["c"]), weights=(1.0, 1.0, 2.0), frames_per_pack=0
    )
    loader = loader_of(data_config, tokenizer)
    assert "share 50.0% as 'c'" in loader.describe()[2]
    stats = [next(loader)[1] for _ in range(12)]
    total = sum((Counter(s.sources) for s in stats), Counter())
    assert sum(total.values()) == sum(s.samples for s in stats)
    assert total["c"] / sum(total.values()) == pytest.approx(0.5, abs=0.2)  # exact as drawn; packing reorders
    assert sum((Counter(s.languages) for s in stats), Counter()) == {"zh": total["c"], "en": total["a"] + total["b"]}
    state = loader.get_state()
    expected = [next(loader)[1].sample_ids for _ in range(3)]
    loader.close()
    drawn_before = {name: sum(n) for name, n in _drawn(state, data_config, tokenizer).items()}

    same = loader_of(data_config, tokenizer)
    same.set_state(state)
    assert [next(same)[1].sample_ids for _ in range(3)] == expected
    same.close()
    data_config = replace(data_config, weights=(0.0, 1.0, 1.0))
    changed = loader_of(data_config, tokenizer)
    changed.set_state(state)
    later = [next(changed)[1] for _ in range(40)]
    assert Counter(later[-1].sources)["a"] == 0 and sum(s.sources.get("a", 0) for s in later) < 60  # what waited
    taken = json.loads(changed.get_state())["lanes"]
    changed.close()
    # No number of a source is lost or used twice: each lane goes on where it was.
    assert {n: sum(lane["taken"][n] for lane in taken.values()) for n in ("a", "b", "c")} == drawn_before


def _drawn(state: bytes, config: DataConfig, tokenizer: Tokenizer) -> dict[str, list[int]]:
    mixture = Mixture(open_sources(config.train, "", weights=config.weights), 5, config.packs_per_batch)
    used: dict[str, list[int]] = {source.name: [] for source in mixture.sources}
    for v, lane in json.loads(state)["lanes"].items():
        for source, count in zip(mixture.sources, Lane(mixture, int(v)).used(lane["next"]), strict=True):
            used[source.name].append(count)
    return used


def test_a_source_may_be_added_but_not_lost(
    data_config: DataConfig, tokenizer: Tokenizer, files: dict[str, str]
) -> None:
    data_config = replace(data_config, train=(files["a"],), weights=(1.0,), frames_per_pack=0)
    loader = loader_of(data_config, tokenizer)
    next(loader)
    state = loader.get_state()
    loader.close()
    data_config = replace(data_config, train=(files["a"], files["b"]), weights=(1.0, 1.0))
    more = loader_of(data_config, tokenizer)
    more.set_state(state)
    assert sum(next(more)[1].sources.get("b", 0) for _ in range(6)) > 0
    state = more.get_state()
    more.close()
    data_config = replace(data_config, train=(files["b"],), weights=(1.0,))
    fewer = loader_of(data_config, tokenizer)
    with pytest.raises(UserError, match="saved data position: config.data.train: a is missing"):
        fewer.set_state(state)
    fewer.close()


def test_states_of_hosts_are_merged(data_config: DataConfig, tokenizer: Tokenizer, files: dict[str, str]) -> None:
    data_config = replace(data_config, train=(files["a"],), frames_per_pack=0, packs_per_batch=4)
    hosts = [loader_of(data_config, tokenizer, host, 2) for host in range(2)]
    one = loader_of(data_config, tokenizer)
    for _ in range(3):
        rows = np.concatenate([next(host)[0].tokens for host in hosts])
        np.testing.assert_array_equal(rows, next(one)[0].tokens)
    states = [host.get_state() for host in hosts]
    with pytest.raises(UserError, match="has rows 0, 1, not row 2; merge"):
        one.set_state(states[0])
    expected = next(one)[0].tokens
    one.set_state(merge_states(states))
    np.testing.assert_array_equal(next(one)[0].tokens, expected)
    for loader in (*hosts, one):
        loader.close()
