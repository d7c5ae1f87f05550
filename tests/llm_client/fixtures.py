"""Clips with key frames, and a server behind a socket that answers for models and fails on purpose."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from kangaroo_jax.bench.annotate import faulty_server
from kangaroo_jax.curation.annotate.config import annotation_config


@pytest.fixture
def server() -> Iterator[str]:
    """Address of a server whose every tenth call fails; one for every test, because tests read what it counted."""
    with faulty_server("--faults=0.1", "--latency=0.005", "--hang=5") as url:
        yield url


@pytest.fixture(scope="session")
def honest_server() -> Iterator[str]:
    """Address of a server that never fails."""
    with faulty_server("--faults=0", "--latency=0") as url:
        yield url


@pytest.fixture
def make_clips() -> Callable[..., Path]:
    """Writes selected.jsonl with clips of some key frames each, whose images differ."""

    def make(folder: Path, count: int, frames: int = 5) -> Path:
        (folder / "frames").mkdir(parents=True)
        rows = []
        for i in range(count):
            keyframes = []
            for k in range(frames):
                name = f"frames/{i:04d}_{k}.jpg"
                (folder / name).write_bytes(b"\xff\xd8" + random.Random(f"{i}/{k}").randbytes(200))
                keyframes.append({"path": name, "time": 10.0 + 2 * k})
            row = {"id": f"clip{i:04d}", "media": f"media/{i:04d}.mp4", "start": 10.0, "end": 20.0}
            row |= {"keyframes": keyframes, "category": "abc"[i % 3], "language": "en", "caption": f"title {i}"}
            rows.append(row | {"source": "test", "licence": "none"})
        path = folder / "selected.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return make


@pytest.fixture
def make_config() -> Callable[..., ConfigDict]:
    """A config whose backends are all behind one address."""

    def make(url: str, **changes: object) -> ConfigDict:
        config = annotation_config("endpoint")
        for name, backend in config.backends.items():
            backend.update(base_url=url, model=name, timeout=2.0, first_wait=0.02, concurrency=16, seed=len(name))
        config.refine.update(min_sentence_support=0.0)
        config.choose.update(share=0.5, at_least=0)
        config.update_from_flattened_dict(changes)
        return config

    return make
