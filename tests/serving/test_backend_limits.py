"""A process that decodes for the server, at the bound of its memory."""

import numpy as np
from PIL import Image

from kangaroo_jax.data.media.decode import ProcessDecoder, decode_one
from kangaroo_jax.data.media.video import Clip, MediaRef
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.memory import Bounded
from kangaroo_jax.system.processes import WorkerPool


def test_a_picture_that_needs_more_than_the_bound_costs_its_own_request(tmp_path):
    Image.fromarray(np.zeros((8000, 8000), np.uint8)).save(tmp_path / "large.png", compress_level=1)
    Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(tmp_path / "small.png")
    decoder = ProcessDecoder(1, 60.0, prepare=Bounded(96 << 20).begin)
    try:
        large, small = (MediaRef("image", str(tmp_path / f"{name}.png"), (0.0,)) for name in ("large", "small"))
        assert isinstance(decoder.submit(small, 16).result(120), Clip)
        outcome = decoder.submit(large, 16).result(120)
        assert isinstance(outcome, UserError) and "large.png" in str(outcome) and "\n" not in str(outcome)
        assert isinstance(decoder.submit(small, 16).result(120), Clip)
    finally:
        decoder.close()
    assert isinstance(decode_one(large, 16), Clip)  # without a bound there is nothing wrong with it


def test_a_process_that_decodes_does_not_wait_for_jax():
    pool = WorkerPool(eval, 1, 60.0, prepare=Bounded(1 << 30).begin)
    assert pool.submit("[name for name in ('jax', 'flax') if name in __import__('sys').modules]").result() == []
    pool.close()
