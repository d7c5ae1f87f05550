"""The measurement of conversions, at a size at which it measures little."""

import pytest

from kangaroo_jax.bench.convert import bench_convert
from kangaroo_jax.config import stage_config
from kangaroo_jax.errors import UserError


@pytest.mark.slow
def test_every_file_comes_back_and_nothing_is_left(tmp_path):
    config = stage_config("tiny")
    config.data.image_size = 48
    result = bench_convert(tmp_path / "bench", config, tell=lambda line: None)
    assert result["files_equal"] == "1 of 1"
    assert 0 < result["to_orbax_peak_gib"] < 3 and result["to_hf_cpu_seconds"] > 0
    assert not list((tmp_path / "bench").iterdir())
    (tmp_path / "bench" / "copy").mkdir()
    with pytest.raises(UserError, match="holds copy already"):
        bench_convert(tmp_path / "bench", config)
