"""Passes over the data in place of steps."""

import dataclasses
import math

from kangaroo_jax.config import StageConfig, frames_per_group, tokens_per_group
from kangaroo_jax.data.batches.draws import draws_a_row
from kangaroo_jax.data.batches.loader import open_mixture
from kangaroo_jax.data.tokenizer import Tokenizer
from kangaroo_jax.system.progress import Tell
from kangaroo_jax.training.distributed import said_by_main

_TIMEOUT = 3600.0  # seconds that a host waits for the main one, which may fetch media


def draws_a_step(config: StageConfig, tokenizer: Tokenizer) -> tuple[float, int]:
    """(samples that a step draws on average, samples of all sources of `config.data`). Raises UserError."""
    mixture, _ = open_mixture(config.data, config.seed)
    sizes = frames_per_group(config.model), tokens_per_group(config.model, config.data.image_size)
    return config.data.packs_per_batch * draws_a_row(mixture, tokenizer, config.data, *sizes), mixture.epoch


def with_epochs(config: StageConfig, tokenizer: Tokenizer, tell: Tell) -> StageConfig:
    """The stage with `train.steps` so that it draws `train.epochs` times as many samples as its sources have.

    Every host must call it, and has the main one's number. It depends on the config and the data alone, so that a
    stage that goes on is as long as before. Raises UserError if none of the samples can be used.
    """
    wanted = config.train.epochs

    def steps() -> str:
        drawn, samples = draws_a_step(config, tokenizer)
        found = max(1, math.ceil(wanted * samples / drawn))
        tell(f"{config.stage}: {wanted:g} epochs of {samples:,} samples are {found:,} steps of {drawn:.1f} samples")
        return str(found)

    found = int(said_by_main(f"steps/{config.stage}", steps, _TIMEOUT))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=found))
