"""A Ray that a curation starts answers nobody else on the machine."""

import os
import sys

import pytest

from kangaroo_jax.curation.engine import run as engine
from kangaroo_jax.errors import UserError


@pytest.mark.parametrize(("address", "token"), [("", True), ("head:6379", False)])
def test_a_ray_that_is_started_here_asks_for_a_token(address, token, tmp_path, monkeypatch):
    """It is told before it is imported; a cluster that is there has a token of its own, or none."""
    (tmp_path / "ray.py").write_text("import os\nraise ImportError(os.environ['RAY_AUTH_MODE'])\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with pytest.raises((UserError, KeyError)) as error:
        engine.run_ray([], None, address)
    assert isinstance(error.value, UserError) is token
    assert (os.environ.get("RAY_AUTH_MODE") == "token") is token
    assert len(os.environ.get("RAY_AUTH_TOKEN", "")) == 64 * token
