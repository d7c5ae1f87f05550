"""What all tests share: eight virtual CPU devices, no accelerator, compiled functions kept between runs."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tests.quick import quick_flags

# Before jax is imported. CI, which runs the slow tests too, compiles as in real use.
os.environ["JAX_PLATFORMS"] = "cpu"
if "PYTEST_XDIST_WORKER" not in os.environ:  # which has them from its parent
    os.environ["XLA_FLAGS"] = " ".join(
        ["--xla_force_host_platform_device_count=8"]
        + quick_flags() * ("--slow" not in sys.argv)
        + [os.environ.get("XLA_FLAGS", "")]
    ).strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # one that reads what another has half written compiles again
    os.environ["JAX_COMPILATION_CACHE_DIR"] += f"-{worker}"
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell: tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from kangaroo_jax.config import ModelConfig, stage_config
from kangaroo_jax.models.kangaroo import KangarooModel


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--nightly", action="store_true", help="also run the tests marked nightly")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for mark in ("slow", "nightly"):
        if config.getoption(f"--{mark}") or mark in config.getoption("markexpr"):
            continue
        skip = pytest.mark.skip(reason=f"{mark}: run with --{mark}")
        for item in items:
            if mark in item.keywords:
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
def make_random_model() -> Callable[[ConfigDict], nnx.Module]:
    """Makes the model of `config.model` with random weights, which nothing has to be compiled for.

    They are larger than those of a fresh model, so that its answers differ and depend on the pixels.
    """

    def make(config: ConfigDict) -> nnx.Module:
        rng = np.random.default_rng(0)
        graph, weights = nnx.split(
            nnx.eval_shape(lambda: KangarooModel(ModelConfig.from_config(config), rngs=nnx.Rngs(0)))
        )

        def draw(path: tuple, weight: jax.ShapeDtypeStruct) -> jax.Array:
            name = jax.tree_util.keystr(path)
            value = 1.0 if "scale" in name else 0.0 if "bias" in name else 0.4 * rng.standard_normal(weight.shape)
            return jnp.asarray(np.full(weight.shape, value), weight.dtype)

        return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, weights))

    return make


@pytest.fixture(scope="session")
def make_micro_config() -> Callable[[], ConfigDict]:
    """Makes a `micro_config`, for fixtures that are shared."""
    return _micro_config
