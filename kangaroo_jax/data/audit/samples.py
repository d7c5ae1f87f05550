"""The samples of several annotation files, one after another."""

from collections.abc import Sequence
from typing import Any

from kangaroo_jax.data.annotations.conversation import Conversation
from kangaroo_jax.data.annotations.webdataset import Unfinished
from kangaroo_jax.data.batches.mixture import Source


class Samples(Sequence[Conversation]):
    """The samples of all sources, one source after another."""

    def __init__(self, sources: Sequence[Source], *, finished: bool = False) -> None:
        """With `finished`, samples of tar shards that lack a caption or medium after failed downloads are left out."""
        self._places = [(source, n) for source in sources for n in range(source.count)]
        if finished:
            whole = [(s, n) for s, n in self._places if not isinstance(s.file.look_at(s.sample(n)), Unfinished)]
            if len(whole) < len(self._places):
                print(f"{len(self._places) - len(whole):,} samples without caption or medium are left out")
            self._places = whole

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        source, number = self._places[index]
        return source.file[source.sample(number)]
