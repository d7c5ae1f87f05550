"""Compiled programs are kept where the user's caches are, or where JAX was told."""

from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from kangaroo_jax.cli.chat import chat
from kangaroo_jax.cli.eval import evaluate
from kangaroo_jax.inference.compiled import keep_programs
from kangaroo_jax.serving.backend import Choices, open_backend
from kangaroo_jax.serving.limits import Limits


class Kept(Exception):
    """What is raised in place of keeping programs."""


def _evaluate(checkpoint: str) -> None:
    evaluate(checkpoint=checkpoint, benchmark="quickstart", data=checkpoint, workdir=f"{checkpoint}/eval")


@pytest.mark.parametrize(
    "answers",
    (
        lambda checkpoint: chat(checkpoint=checkpoint, query="What comes first?"),
        lambda checkpoint: open_backend(Choices(checkpoint), Limits()),  # of serve and web
        _evaluate,
    ),
    ids=("chat", "serve", "eval"),
)
def test_what_answers_keeps_its_programs_before_it_loads(
    answers: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep() -> None:
        raise Kept

    monkeypatch.setattr("kangaroo_jax.inference.compiled.keep_programs", keep)
    with pytest.raises(Kept):
        answers(str(tmp_path))


@pytest.mark.parametrize("told", (None, "/elsewhere"))
def test_programs_are_kept_between_runs(told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", told)
        keep_programs()
        assert jax.config.jax_compilation_cache_dir == (told or str(tmp_path / "kangaroo" / "programs"))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
