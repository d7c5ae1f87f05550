"""What all tests share: eight virtual CPU devices, no accelerator, compiled functions kept between runs."""

import os
from collections.abc import Callable
from pathlib import Path

# Before jax is imported.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import pytest
from ml_collections import ConfigDict

from kangaroo_jax.config import stage_config


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow") or "slow" in config.getoption("markexpr"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


def _micro_config() -> ConfigDict:
    config = stage_config("tiny")
    model, data = config.model, config.data
    model.vision.update(width=24, depth=2, heads=2, mlp_width=32, pos_embed_grid=2, rope_reference_grid=2)
    model.llm.update(vocab_size=400, width=32, depth=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48)
    data.update(image_size=16, min_frames=2, max_frames=6, long_min_frames=4, long_max_frames=8)
    return config


@pytest.fixture
def micro_config() -> ConfigDict:
    """A stage's config whose model is smaller than `tiny` still: two layers each, 16-pixel frames of 2 x 2 patches."""
    return _micro_config()


@pytest.fixture(scope="session")
def make_micro_config() -> Callable[[], ConfigDict]:
    """Makes a `micro_config`, for fixtures that are shared."""
    return _micro_config
