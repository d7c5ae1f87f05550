"""The benchmark runs the real step and reports what it measured."""

import json

from kangaroo_jax.tools import bench


def test_bench_train_reports_rates(make_micro_config, capsys, monkeypatch):
    config = make_micro_config()
    config.data.update(packs_per_batch=1, tokens_per_pack=64, frames_per_pack=4)
    monkeypatch.setattr(bench, "load_config", lambda spec: config)
    bench.main(["train", "--steps=2", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["ms_per_step"] > 0 and result["tokens_per_second"] > 0 and result["frames_per_second"] > 0
    batch = bench.full_batch(config)
    assert (batch.vision_index >= 0).sum() == 4 // 2 * 1 * 1  # two groups of one token: 2 x 2 patches joined
