"""Rows that several hosts have: each decodes the frames that its own devices hold, and all agree on what was decoded.

Pixels stay where they are decoded. The hosts of a row tell each other the times of its frames, which all need, and what
could not be decoded, so that a sample that one of them lost is lost to all:

1. Each decodes its moments of a medium without those between, or the whole where damage may have a part in them.
2. All say what they have. Where one had to decode the whole, or all together miss too many moments, those with a part
   decode the whole as well, and say what became of it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np

from kangaroo_jax.data.media.decode import Decoder, Outcome
from kangaroo_jax.data.media.picker import MISSED_SHARE
from kangaroo_jax.data.media.video import Clip, MediaRef
from kangaroo_jax.errors import UserError

_NONE, _PART, _WHOLE, _LOST = "none", "part", "whole", "lost"  # what a host has of a medium
_Said = dict[str, Any]  # what a host says that it has of a medium


class Messages(Protocol):
    """What hosts tell each other."""

    def exchange(self, name: str, text: str, hosts: Collection[int]) -> dict[int, str]:
        """Say `text` under a name; returns what each of `hosts` says under it, in order of the hosts, this one too."""

    def begin_anew(self) -> None:
        """Names may be used again: all hosts begin anew alike."""

    def stop(self) -> None:
        """Have a thread that waits for others raise an error, now and until `begin_anew`."""


@dataclasses.dataclass(frozen=True)
class SharedRow:
    """A row of the batch of which several hosts have a piece."""

    hosts: frozenset[int]  # all of them, this one too
    frames: frozenset[int]  # the numbers of those that this host's devices hold


@dataclasses.dataclass(frozen=True)
class Asked:
    """A medium that is being decoded; `future` is None where none of its frames are this host's."""

    ref: MediaRef
    future: "Future[Outcome] | None"


class Sharing:
    """This host's part in rows that others have as well; of rows that are not `shared` it decodes everything."""

    def __init__(self, shared: Mapping[int, SharedRow] | None = None, messages: Messages | None = None) -> None:
        """`shared` by the row's number in the batch; without any no `messages` are needed."""
        self._shared, self._messages, self._settled = dict(shared or {}), messages, 0

    def begin_anew(self) -> None:
        """The next batch is the first one, on all hosts."""
        self._settled = 0
        if self._messages is not None:
            self._messages.begin_anew()

    def stop(self) -> None:
        """Free a thread that waits for other hosts, by an error."""
        if self._messages is not None:
            self._messages.stop()

    def frames_here(self, row: int, frames: int) -> int:
        """How many of a row's `frames` this host decodes."""
        return len(self._shared[row].frames) if row in self._shared else frames

    def ask(self, row: int, first: int, refs: Sequence[MediaRef], decoder: Decoder, image_size: int) -> list[Asked]:
        """Begin to decode this host's frames of media that stand in a row one after the other, from `first` on."""
        asked = []
        for ref in refs:
            if row in self._shared:
                here = self._shared[row].frames
                ref = dataclasses.replace(ref, moments=tuple(m for m in range(len(ref.times)) if first + m in here))
            asked.append(Asked(ref, decoder.submit(ref, image_size) if ref.wanted else None))
            first += len(ref.times)
        return asked

    def settle(
        self, rows: Mapping[int, tuple[str, Sequence[Asked]]], decoder: Decoder, image_size: int
    ) -> dict[int, list[Outcome]]:
        """What was decoded of each row's media: the same on all hosts that have the row, but for the pixels.

        Args:
            rows: row -> a text that names its samples on all hosts alike, and its media.
            decoder: decodes the whole of what cannot be divided.
            image_size: S, pixels.

        Raises:
            UserError: another host has other samples in a row.
        """
        found = {row: [_outcome(one, image_size) for one in media] for row, (_, media) in rows.items()}
        if self._messages is None:
            return found
        name, self._settled = str(self._settled), self._settled + 1
        mine = {row: {"of": _digest(*rows[row]), "media": [*map(_said, found[row])]} for row in self._shared}
        said = self._exchange(name, mine, self._shared)
        for row, hosts in said.items():
            if len({one["of"] for one in hosts.values()}) > 1:
                raise UserError(
                    f"hosts {', '.join(map(str, hosts))} have different samples in row {row} of a batch: an annotation "
                    "file or a medium is not the same on all of them, or one could not read it (see their ledgers)"
                )
        media = {
            row: [list(one) for one in zip(*(of["media"] for of in said[row].values()), strict=True)] for row in said
        }
        whole = {row: [i for i, one in enumerate(media[row]) if _needs_whole(rows[row][1][i].ref, one)] for row in said}
        if needing := [row for row in said if whole[row]]:
            for row in needing:
                self._decode_whole(rows[row][1], whole[row], found[row], decoder, image_size)
            mine = {row: {"media": [_said(found[row][i]) for i in whole[row]]} for row in needing}
            for row, hosts in self._exchange(f"{name} whole", mine, needing).items():
                for place, i in enumerate(whole[row]):
                    media[row][i] += [of["media"][place] for of in hosts.values()]
        return found | {row: [*map(_agreed, found[row], media[row])] for row in said}

    def _exchange(self, name: str, mine: dict[int, Any], rows: Collection[int]) -> dict[int, dict[int, Any]]:
        """What each host of some rows says of them: row -> host, in order -> what it says."""
        assert self._messages is not None
        hosts = frozenset().union(*(self._shared[row].hosts for row in rows))
        texts = self._messages.exchange(name, json.dumps(mine), hosts)
        said = {host: json.loads(text) for host, text in texts.items()}
        return {row: {host: said[host][str(row)] for host in sorted(self._shared[row].hosts)} for row in rows}

    def _decode_whole(
        self, media: Sequence[Asked], which: Sequence[int], found: list[Outcome], decoder: Decoder, image_size: int
    ) -> None:
        """Replace what there is of some media by the same frames of the whole, where it is a part."""
        parts = [i for i in which if _said(found[i])["is"] == _PART]
        futures = [decoder.submit(dataclasses.replace(media[i].ref, moments=None), image_size) for i in parts]
        for i, future in zip(parts, futures, strict=True):
            outcome, moments = future.result(), media[i].ref.moments
            if isinstance(outcome, Clip) and moments is not None:
                pixels = outcome.pixels[list(moments)]
                outcome = dataclasses.replace(outcome, pixels=pixels, moments=moments, certain=False)
            found[i] = outcome


def _outcome(asked: Asked, image_size: int) -> Outcome:
    """What became of a medium; a clip without pixels where none of its frames were asked for."""
    if asked.future is not None:
        return asked.future.result()
    return Clip(np.zeros((0, image_size, image_size, 3), np.uint8), np.full(len(asked.ref.times), np.nan), moments=())


def _digest(samples: str, media: Sequence[Asked]) -> str:
    """A digest of what stands in a row, without the paths of its media."""
    refs = [(one.ref.kind, one.ref.times, one.ref.start, len(one.ref.frames)) for one in media]
    return hashlib.sha256(repr((samples, refs)).encode(errors="surrogatepass")).hexdigest()


def _said(outcome: Outcome) -> _Said:
    """What other hosts must know of an outcome."""
    if isinstance(outcome, UserError):
        return {"is": _LOST, "why": str(outcome)}
    if outcome.moments == ():
        return {"is": _NONE}
    if not outcome.certain:
        return {"is": _WHOLE, "times": outcome.times.tolist()}
    moments = list(range(len(outcome.times)) if outcome.moments is None else outcome.moments)
    return {"is": _PART, "moments": moments, "times": outcome.times[moments].tolist(), "missed": outcome.missed}


def _needs_whole(ref: MediaRef, said: Sequence[_Said]) -> bool:
    """Whether hosts that have a part of a medium must decode the whole of it."""
    parts = {tuple(one["moments"]): one["missed"] for one in said if one["is"] == _PART}
    kinds = {one["is"] for one in said}
    missing = sum(parts.values()) > int(MISSED_SHARE * len(ref.times))
    return bool(parts) and _LOST not in kinds and (_WHOLE in kinds or missing)


def _agreed(mine: Outcome, said: Sequence[_Said]) -> Outcome:
    """The outcome by what all hosts say: with the times of all frames, or the error of the first that has one."""
    times = np.full(0 if isinstance(mine, UserError) else len(mine.times), np.nan)
    for one in said:
        if one["is"] == _LOST:
            return UserError(one["why"])
    for one in said:
        if one["is"] == _WHOLE:
            times[:] = one["times"]
            break
        if one["is"] == _PART:
            times[one["moments"]] = one["times"]
    assert isinstance(mine, Clip)
    return dataclasses.replace(mine, times=times)
