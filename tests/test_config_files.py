"""Stage files: every one loads with every preset, and a mistake in a path or a key is one line."""

from pathlib import Path

import pytest

from kangaroo_jax.config_files import config_keys, find_config, load_config, nearest
from kangaroo_jax.errors import UserError

ROOT = Path(__file__).parents[1]


def test_every_stage_file_loads_with_every_preset():
    files = (ROOT / "configs").glob("*.py")
    names = sorted(path.stem for path in files if "stage_config" in path.read_text())  # the others train nothing
    assert len(names) >= 5
    for name in names:
        for preset in ("tiny", "base_100m", "kangaroo_8b"):
            config = load_config(f"{name}:{preset}")
            assert config.stage == name and config.model.preset == preset and config.is_locked
        assert len([key for key in config_keys(config) if "." in key]) < 125


def test_a_preset_has_stages_of_its_own_or_those_of_the_paper():
    """The small world of the quickstart stands apart: no stage file asks which preset it is for."""
    paper, middle, tiny = (load_config(f"stage3_refine:{preset}") for preset in ("kangaroo_8b", "base_100m", "tiny"))
    assert paper.data == middle.data and paper.optimizer == middle.optimizer and paper.train == middle.train
    assert (paper.data.image_size, tiny.data.image_size) == (448, 32) and tiny.data.max_frames == 16
    assert load_config("configs/tiny/stage3_refine.py") == load_config("configs/stage3_refine.py:tiny") == tiny
    with pytest.raises(UserError, match="did you mean 'stage0_text_warmup:tiny'"):
        load_config("stage0_text_warmup:base_100m")
    for file in (ROOT / "configs").glob("stage*.py"):
        assert "if preset" not in file.read_text(encoding="utf-8")


def test_a_path_wins_over_a_name_and_mistakes_in_it_are_one_line(tmp_path):
    mine = tmp_path / "stage3_refine.py"
    mine.write_text(find_config("stage3_refine").read_text().replace('c.stage = "stage3_refine"', 'c.stage = "mine"'))
    assert load_config(f"{mine}:tiny").stage == "mine"
    assert load_config("configs/stage3_refine.py:tiny").stage == "stage3_refine"
    for text, message in {
        "x = 1": "defines no function get_config",
        "def get_config(): return {}": "get_config returned dict",
        "def get_config(): return None": "takes no preset",
        "import nothing_of_this_name": "cannot be loaded .ModuleNotFoundError",
        "def get_config(": "cannot be loaded .SyntaxError",
        "def get_config(preset): raise ValueError('two\\nlines')": "two lines",
    }.items():
        mine.write_text(text)
        with pytest.raises(UserError, match=message) as error:
            load_config(f"{mine}:tiny" if "get_config(): return {}" not in text else str(mine))
        assert "\n" not in str(error.value)


def test_nearest_finds_a_key_whose_section_is_missing():
    keys = ["optimizer", "optimizer.learning_rate", "train.steps"]
    assert nearest("learning_rte", keys) == " (did you mean 'optimizer.learning_rate'?)"
    assert nearest("optimiser.learning_rate", keys) == " (did you mean 'optimizer.learning_rate'?)"
    assert nearest("zzz", keys) == ""
