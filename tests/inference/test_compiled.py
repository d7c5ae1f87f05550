"""Compiled programs are kept where the user's caches are, or where JAX was told."""

from pathlib import Path

import jax
import pytest

from kangaroo_jax.inference.compiled import keep_programs


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
