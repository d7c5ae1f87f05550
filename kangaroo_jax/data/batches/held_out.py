"""Batches of annotations that are not trained on: each sample once, the same batches every time."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from kangaroo_jax.config import DataConfig
from kangaroo_jax.conventions import PackedBatch
from kangaroo_jax.data.batches.feed import RecipeMaker, Unusable, path_in
from kangaroo_jax.data.batches.ledger import Ledger
from kangaroo_jax.data.batches.mixture import Mixture, open_sources
from kangaroo_jax.data.batches.packing import PackItem, SampleIndex, Shape, assemble, fill_row, first_frames
from kangaroo_jax.data.batches.sharing import Sharing
from kangaroo_jax.data.batches.stream import clips_of
from kangaroo_jax.data.media.decode import Decoder, Outcome, ThreadDecoder
from kangaroo_jax.data.media.video import Clip
from kangaroo_jax.data.tokenizer import Tokenizer
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.cpus import usable_cpus


class HeldOutBatches:
    """Every sample of some annotations once, packed into B rows of T tokens and F frames.

    Recipes are made and packed once, by every host alike; pixels are decoded anew in every pass. A sample that cannot
    be read is entered in the ledger and left out of every pass.
    """

    def __init__(
        self,
        files: Sequence[str],
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        frames_per_group: int,
        tokens_per_group: int,
        ledger: Ledger,
        rows: Sequence[int],
        sharing: Sharing | None = None,
    ) -> None:
        """`files` as `config.data.train` names them; `rows` of every batch are this host's, or it is `sharing` them.

        Raises UserError: a file is missing or has a mistake, or none of the samples can be used.
        """
        self._shape = Shape(
            config.tokens_per_pack, config.frames_per_pack, config.image_size, frames_per_group, tokens_per_group
        )
        self._rows, self._size, self._ledger = rows, config.packs_per_batch, ledger
        self._sharing = sharing or Sharing()
        mixture = Mixture(open_sources(files, config.media_root, config.registry), 0, 1, shuffle=False)
        self._names = [source.name for source in mixture.sources]
        indices = [mixture.in_order(0, number) for number in range(mixture.epoch)]
        decoder = ThreadDecoder(0)
        maker = RecipeMaker(mixture, tokenizer, config, frames_per_group, tokens_per_group, decoder)
        with ThreadPoolExecutor(usable_cpus(), "recipe") as pool:
            made = list(pool.map(maker, indices))
        decoder.close()
        items: list[PackItem] = []
        for index, one in zip(indices, made, strict=True):
            if isinstance(one, Unusable):
                self._skip(index, one.id, one.path, one.reason, "recipe")
            elif len(one.tokens) > self._shape.tokens or one.frames > self._shape.frames:
                reason = f"{len(one.tokens)} tokens and {one.frames} frames are more than a row holds"
                self._skip(index, one.id, "", reason, "recipe")
            else:
                items.append(PackItem(index, one))
        if not items:
            where = f"; see {ledger.path}" if ledger.path else ""
            raise UserError(f"config.eval.held_out: none of the {len(indices)} samples can be used{where}")
        self.samples = len(items)
        self._packed = _packed(items, self._shape)

    def _skip(self, index: SampleIndex, name: str, path: str, reason: str, stage: str) -> None:
        self._ledger.add((self._names[index[0]], index[1]), name, path, reason, stage)

    def __iter__(self) -> Iterator[PackedBatch]:
        """This host's rows of each batch; the last batch is filled up with empty rows."""
        decoder = ThreadDecoder(usable_cpus())
        try:
            for first in range(0, len(self._packed), self._size):
                rows = self._packed[first : first + self._size]
                rows = rows + [[] for _ in range(self._size - len(rows))]
                mine = {row: rows[row] for row in self._rows}
                decoded = self._decoded(mine, decoder)
                clips = [[self._clips(item, decoded[row]) for item in items] for row, items in mine.items()]
                yield assemble([[item.recipe for item in items] for items in mine.values()], clips, self._shape)
        finally:
            decoder.close()

    def _decoded(self, rows: dict[int, list[PackItem]], decoder: Decoder) -> dict[int, Iterator[Outcome]]:
        """What becomes of the media of each row, one after the other."""
        side, asked = self._shape.image_size, {}
        for row, items in rows.items():
            recipes = [item.recipe for item in items]
            media = [
                self._sharing.ask(row, first, recipe.media, decoder, side)
                for recipe, first in zip(recipes, first_frames(recipes), strict=True)
            ]
            asked[row] = repr([item.index for item in items]), [one for sample in media for one in sample]
        return {row: iter(outcomes) for row, outcomes in self._sharing.settle(asked, decoder, side).items()}

    def _clips(self, item: PackItem, outcomes: Iterator[Outcome]) -> list[Clip] | None:
        """The clips of a sample, None where they cannot be read."""
        outcome = clips_of([next(outcomes) for _ in item.recipe.media])
        if isinstance(outcome, UserError):
            path = path_in(str(outcome), item.recipe.media)
            self._skip(item.index, item.recipe.id, path, str(outcome), "decode")
            return None
        return outcome


def _packed(items: Sequence[PackItem], shape: Shape) -> list[list[PackItem]]:
    """The samples in rows, each begun with the largest that is left."""
    limits = np.array([shape.tokens, shape.frames], np.int64)
    left, rows = list(items), []
    while left:
        needs = np.array([[len(item.recipe.tokens), item.recipe.frames] for item in left], np.int64)
        sizes = (needs / np.maximum(limits, 1)).sum(1)
        chosen = set(fill_row(needs, sizes, limits, int(sizes.argmax())))
        rows.append([one for i, one in enumerate(left) if i in chosen])
        left = [one for i, one in enumerate(left) if i not in chosen]
    return rows
