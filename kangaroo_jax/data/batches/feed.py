"""The samples of a lane in order, as recipes: made ahead in threads, and cached within a limit of memory."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from kangaroo_jax.config import DataConfig
from kangaroo_jax.data.batches.mixture import Lane, Mixture
from kangaroo_jax.data.batches.packing import Packer, SampleIndex
from kangaroo_jax.data.batches.sample import Recipe, make_recipe
from kangaroo_jax.data.media.addresses import short
from kangaroo_jax.data.media.decode import Decoder
from kangaroo_jax.data.tokenizer import Tokenizer
from kangaroo_jax.errors import UserError, one_line


@dataclasses.dataclass(frozen=True)
class Unusable:
    """A sample of which no recipe could be made."""

    id: str
    path: str
    reason: str


Made = Recipe | Unusable


class RecipeMaker:
    """Makes the recipe of a sample index; the recipes used last are kept, up to an eighth of `cache_mib`."""

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: Tokenizer,
        config: DataConfig,
        frames_per_group: int,
        tokens_per_group: int,
        decoder: Decoder,
    ) -> None:
        """`decoder` probes the media."""
        self._files = [source.file for source in mixture.sources]
        self._tokenizer, self._config, self._sizes = tokenizer, config, (frames_per_group, tokens_per_group)
        self._probe: Callable[..., Any] = decoder.probe
        self._kept: collections.OrderedDict[SampleIndex, Recipe] = collections.OrderedDict()
        self._room = config.cache_mib << 17

    def kept(self, index: SampleIndex) -> Recipe | None:
        """The recipe, if it is kept. `kept` and `keep` must be called from one thread."""
        recipe = self._kept.get(index)
        if recipe is not None:
            self._kept.move_to_end(index)
        return recipe

    def keep(self, index: SampleIndex, recipe: Recipe) -> None:
        """Keep a recipe, and drop the least recently used ones beyond the limit."""
        if self._room <= 0 and not self._kept or index in self._kept:
            return
        self._kept[index] = recipe
        self._room -= _bytes_of(recipe)
        while self._room < 0:
            self._room += _bytes_of(self._kept.popitem(last=False)[1])

    def __call__(self, index: SampleIndex) -> Made:
        """The recipe, or why there is none; nothing is raised. May be called from any thread."""
        source, number = index
        name = f"{self._files[source].path}#{number}"
        try:
            conversation = self._files[source][number]
        except Exception as error:  # a record that was not checked when the file was opened
            return Unusable(name, "", _reason(error, name))
        try:
            return make_recipe(conversation, self._tokenizer, self._config, *self._sizes, self._probe)
        except Exception as error:
            reason = _reason(error, name)
            return Unusable(conversation.id, path_in(reason, conversation.media), reason)


def _reason(error: Exception, name: str) -> str:
    """The error in one line; an error other than UserError is given the sample's name and its type."""
    if isinstance(error, UserError):
        return str(error)
    return f"{short(name)}: cannot be used ({type(error).__name__}: {one_line(error)[:200]})"


def _bytes_of(recipe: Recipe) -> int:
    return 9 * len(recipe.tokens) + 64 * recipe.frames + 1000


def path_in(reason: str, media: Sequence[Any]) -> str:
    """The file of a sample that a message is about, "" where it names none."""
    paths = [path for medium in media for path in (medium.path, *medium.frames)]
    named = (path for path in paths if path in reason or short(path) in reason)
    return next(named, paths[0] if len(paths) == 1 else "")


class LaneFeed:
    """The samples of a lane in order, their recipes made ahead in threads, and its packer."""

    def __init__(
        self, lane: Lane, maker: RecipeMaker, packer: Packer, pool: ThreadPoolExecutor | None, ahead: int
    ) -> None:
        """`ahead` recipes are being made in `pool`; without a pool each is made when it is taken."""
        self.lane, self.packer = lane, packer
        self._maker, self._pool, self._ahead = maker, pool, ahead if pool else 1
        self._queue: collections.deque[tuple[SampleIndex, Future[Made] | Made]] = collections.deque()
        self._asked = lane.next

    def take(self) -> tuple[SampleIndex, Made]:
        """The next sample."""
        while len(self._queue) < self._ahead:
            index = self.lane.at(self._asked)
            self._asked += 1
            self._queue.append((index, self._start(index)))
        index, made = self._queue.popleft()
        self.lane.next += 1
        if isinstance(made, Future):
            made = made.result()
        if isinstance(made, Recipe):
            self._maker.keep(index, made)
        return index, made

    def _start(self, index: SampleIndex) -> "Future[Made] | Made":
        recipe = self._maker.kept(index)
        if recipe is not None:
            return recipe
        return self._pool.submit(self._maker, index) if self._pool is not None else self._maker(index)
