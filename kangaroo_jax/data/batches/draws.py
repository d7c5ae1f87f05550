"""How many samples a row of the batch uses up, before any media is decoded."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from kangaroo_jax.config import DataConfig
from kangaroo_jax.data.batches.feed import LaneFeed, RecipeMaker, Unusable
from kangaroo_jax.data.batches.mixture import Lane, Mixture
from kangaroo_jax.data.batches.packing import Packer, PackItem
from kangaroo_jax.data.batches.sample import Recipe
from kangaroo_jax.data.media.decode import ThreadDecoder
from kangaroo_jax.data.tokenizer import Tokenizer
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.cpus import usable_cpus

_ROWS, _LANES, _AHEAD = 64, 2, 32  # rows that are packed, lanes that they are of, recipes of each made ahead


def draws_a_row(
    mixture: Mixture, tokenizer: Tokenizer, config: DataConfig, frames_per_group: int, tokens_per_group: int
) -> float:
    """Samples that a row uses up on average, those that cannot be read among them.

    The first rows are begun with the largest samples that wait, so that counting what is in them would be too low. But
    they are as full as later ones: what a row holds is divided by what a sample takes. It depends on the mixture and
    the config alone. Raises UserError if none of the samples can be used.
    """

    def size(recipe: Recipe) -> float:
        """The shares of a row's tokens and of its frames that it takes, added."""
        return len(recipe.tokens) / config.tokens_per_pack + recipe.frames / max(config.frames_per_pack, 1)

    decoder = ThreadDecoder(0)
    maker = RecipeMaker(mixture, tokenizer, config, frames_per_group, tokens_per_group, decoder)
    try:
        with ThreadPoolExecutor(usable_cpus(), "recipe") as pool:
            feeds = [
                LaneFeed(
                    Lane(mixture, number),
                    maker,
                    Packer(config.tokens_per_pack, config.frames_per_pack, config.packing_bins),
                    pool,
                    _AHEAD,
                )
                for number in range(min(mixture.lanes, _LANES))
            ]
            taken: list[float] = []
            rows = [_row_of(feed, mixture, size, taken) for _, feed in zip(range(_ROWS), itertools.cycle(feeds))]
    finally:
        decoder.close()
    drawn = sum(feed.lane.next for feed in feeds)
    return sum(rows) / _ROWS / (sum(taken) / drawn)


def _row_of(feed: LaneFeed, mixture: Mixture, size: Callable[[Recipe], float], taken: list[float]) -> float:
    """Take samples until a row is full; its size. The sizes of all that were taken are appended to `taken`."""
    in_vain = 0
    while True:
        index, made = feed.take()
        if isinstance(made, Unusable):
            in_vain += 1
            if in_vain >= 2 * mixture.epoch:
                raise UserError(f"none of the {mixture.epoch} samples can be used, the last because: {made.reason}")
            continue
        in_vain = 0
        taken.append(size(made))
        row = feed.packer.add(PackItem(index, made))
        if row is not None:
            return sum(size(item.recipe) for item in row)
