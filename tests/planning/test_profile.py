"""What a profile has measured, by part, beside what is foretold."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from kangaroo_jax.chips import CHIPS
from kangaroo_jax.cli import main as cli
from kangaroo_jax.errors import UserError
from kangaroo_jax.planning import cycles, plan
from kangaroo_jax.planning.profile import Measured, compared, measured

RUNS = 3


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """(folder of a profile of a small program on a CPU, its text)."""

    @jax.jit
    def step(x, w):
        with jax.named_scope("vision"):
            x = jnp.exp(x @ w)
        with jax.named_scope("llm"):
            x = jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ w), None), x, None, length=4)[0]
        return x.sum()

    folder = tmp_path_factory.mktemp("profile")
    x = jnp.ones((128, 128))
    text = step.lower(x, x).compile().as_text()
    step(x, x).block_until_ready()
    with jax.profiler.trace(str(folder)):
        for _ in range(RUNS):
            step(x, x).block_until_ready()
    return folder, text


def test_a_profile_is_read_by_part(profiled):
    found = measured(profiled[0], CHIPS["v5e"])
    assert (found.program, found.runs) == ("jit_step", RUNS)
    assert set(found.parts) == set(cycles.PARTS)
    assert found.parts["llm_products"] > 0 and found.parts["vision_products"] > 0
    assert found.parts["llm_products"] + found.parts["vision_products"] <= found.seconds
    assert not found.parts["collectives_in_line"] and not found.parts["llm_attention"]


def event(name, start, length):
    return SimpleNamespace(name=name, start_ns=start, duration_ns=length, stats=[])


@pytest.mark.slow
def test_a_tpus_operations_are_counted_once_and_by_run(profiled, monkeypatch):
    """A TPU names operations as the program's text does, loops around their bodies, and runs on a line of their own."""
    folder, text = profiled
    loop = re.search(r"%(while[\w.]*) = ", text).group(1)
    inner = re.search(r"%(\w*tanh\w*[.\w]*) = f32\[128,128\]", text).group(1)
    operations = [event(f"%{loop} = (s32[])", start, 1000) for start in (0, 2000)]
    operations += [event(f"%{inner} = f32[128,128]", start, 400) for start in (100, 500, 2100, 2500)]
    lines = [
        SimpleNamespace(name="XLA Modules", events=[event("jit_step(4)", start, 1000) for start in (0, 2000)]),
        SimpleNamespace(name="XLA Ops", events=operations),
        SimpleNamespace(name="Steps", events=[event(f"%{inner}", 0, 9000)]),
    ]
    planes = [SimpleNamespace(name=f"/device:TPU:{number}", lines=lines) for number in range(2)]
    monkeypatch.setattr(jax.profiler.ProfileData, "from_file", lambda path: SimpleNamespace(planes=planes))
    found = measured(folder, CHIPS["v5e"])
    assert found.runs == 2 and found.seconds == pytest.approx(1000e-9)
    assert found.parts["llm_elementwise"] == pytest.approx(1000e-9)


def test_parts_stand_beside_what_was_foretold():
    parts = dict.fromkeys(cycles.PARTS, 0.0)
    found = Measured("jit_step", 3, parts | {"llm_products": 2.0, "vision_attention": 1.0})
    rows = compared(found, parts | {"llm_products": 1.6, "vision_attention": 0.4})
    assert rows["measured"] == "3 s on a device in a run of jit_step, 3 runs; 1.50 of what was foretold"
    assert rows["measured / foretold, s"] == "llm products 2 / 1.6, vision attention 1 / 0.4"


@pytest.mark.slow
def test_the_plan_prints_both(profiled, monkeypatch, capsys):
    monkeypatch.setattr(plan, "why_not", lambda chip: "no compiler")
    cli.main(["plan", "--config=stage3_refine:kangaroo_8b", "--topology=H100:64", f"--profile-of={profiled[0]}"])
    out = capsys.readouterr().out
    assert "s on a device in a run of jit_step, 3 runs" in out and "llm products" in out


@pytest.mark.parametrize(("content", "message"), [(None, "no profile"), (b"\xff" * 9, "not a profile"), (b"", "taken")])
def test_what_is_no_profile_is_told(tmp_path, content, message):
    file = tmp_path / "x.xplane.pb"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        measured(file, CHIPS["v5e"])
