"""`kangaroo bench checkpoint`: how long an asynchronous save blocks training, how long it takes, and its memory.

It repeatedly saves a state of random numbers, which do not compress (float32 weights and two moments of each), with the
code that training uses. A synchronous save would block training for its whole time.
"""

import dataclasses
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kangaroo_jax.system.memory import peak_mib
from kangaroo_jax.training.checkpoint import Checkpoints
from kangaroo_jax.training.step import TrainState

_ARRAYS = 24  # weights; each has two moments


def random_state(gib: float) -> TrainState:
    """A state of `gib` GiB."""
    rng, size = np.random.default_rng(0), round(gib * 2**30 / 4 / 3 / _ARRAYS)

    def arrays() -> dict[str, jax.Array]:
        return {f"weight_{i:02d}": jnp.asarray(rng.standard_normal(size, np.float32)) for i in range(_ARRAYS)}

    return TrainState(jnp.zeros((), jnp.int32), arrays(), {}, {"mu": arrays(), "nu": arrays()})


def bench_checkpoint(folder: Path, gib: float, rounds: int) -> dict[str, float]:
    """Save `rounds` times after one that is not counted.

    Returns state_gib, held_seconds and save_seconds (medians), held_share (share of the save that blocks; median) and
    held_share_worst, memory_over_state (growth of peak resident memory from the first save on, over the state).
    """
    state = jax.block_until_ready(random_state(gib))
    total = sum(x.nbytes for x in jax.tree.leaves(state))
    checkpoints, before = Checkpoints(folder, state, keep=1), peak_mib()
    held, whole = [], []
    for number in range(rounds + 1):
        state = dataclasses.replace(state, step=jnp.asarray(number, jnp.int32))
        start = time.perf_counter()
        checkpoints.save(state, b"", {})
        held.append(time.perf_counter() - start)
        checkpoints.wait()
        whole.append(time.perf_counter() - start)
    checkpoints.close()
    shares = [a / b for a, b in zip(held[1:], whole[1:], strict=True)]
    return {
        "state_gib": round(total / 2**30, 2),
        "held_seconds": round(statistics.median(held[1:]), 3),
        "save_seconds": round(statistics.median(whole[1:]), 2),
        "held_share": round(statistics.median(shares), 4),
        "held_share_worst": round(max(shares), 4),
        "memory_over_state": round((peak_mib() - before) * 2**20 / total, 2),
    }
