"""Keeps a part of the videos out of the training: whole videos, with all that look the same on one side."""

import collections
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kangaroo_jax.data.media.decode import ThreadDecoder
from kangaroo_jax.data.media.video import MediaRef
from kangaroo_jax.errors import UserError
from kangaroo_jax.finetune.table import Example, answers_of
from kangaroo_jax.finetune.wording import counted, quoted
from kangaroo_jax.system.cpus import usable_cpus
from kangaroo_jax.system.progress import Tell

SHARE, MOST = 0.2, 200  # of the videos that are held out, and the most examples
_SIDE, _ROWS, _COLUMNS = 72, 8, 9  # pixels of a decoded frame; cells of a fingerprint
_BITS, _LEVELS = 6, 6.0  # near-duplicates differ by at most so many bits of 64 and grey levels, in each frame
_MANY_ANSWERS = 50  # more than so many different ones are sentences, not labels


def split(examples: Sequence[Example], seed: int, tell: Tell) -> tuple[list[Example], list[Example]]:
    """(to train on, held out), by the rows' own word where they have one, else a fifth of the videos of each answer.

    Raises UserError: only one video, or nothing is left on a side.
    """
    groups = video_groups(examples, tell)
    if joined := len(groups) - len(set(groups.values())):
        tell(f"videos that look the same as another, and stay on its side of the split: {joined}")
    if any(example.held_out is not None for example in examples):
        held = {groups[example.video] for example in examples if example.held_out}
        both = {groups[e.video] for e in examples if not e.held_out} & held
        if both:
            tell(f"videos (nearly) the same on both sides of the split column, which are held out: {len(both)}")
    else:
        held = _drawn(examples, groups, seed)
    for line in contradictions(examples, groups):
        tell(f"warning: {line}")
    train = [example for example in examples if groups[example.video] not in held]
    test = [example for example in examples if groups[example.video] in held]
    if not train or not test:
        there = counted(len(set(groups.values())), "different video")
        raise UserError(
            f"{there}: none would be {'held out' if train else 'trained on'}; give more, or a file of "
            "others with --held-out=FILE"
        )
    return train, test


def missing_labels(train: Sequence[Example], test: Sequence[Example]) -> list[str]:
    """Lines about answers that are only on one side, where answers are labels."""
    learnt, asked = answers_of(train), answers_of(test)
    if len({**learnt, **asked}) > _MANY_ANSWERS:
        return []
    lines = []
    if never := [answer for answer in learnt if answer not in asked]:
        lines.append(f"never in the held-out part, so not measured: {', '.join(map(quoted, never[:8]))}")
    if unlearnt := [answer for answer in asked if answer not in learnt]:
        lines.append(f"in the held-out part, but never trained: {', '.join(map(quoted, unlearnt[:8]))}")
    return lines


def refuse_shared(train: Sequence[Example], test: Sequence[Example]) -> None:
    """Raise UserError where a part of a file is both trained on and held out."""
    spans: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    for medium in (medium for example in train for medium in example.conversation.media):
        spans[os.path.realpath(medium.path)].append((medium.start or 0.0, medium.end or math.inf))
    shared = {
        medium.path
        for example in test
        for medium in example.conversation.media
        for start, end in spans.get(os.path.realpath(medium.path), ())
        if start < (medium.end or math.inf) and end > (medium.start or 0.0)
    }
    if shared:
        raise UserError(
            f"files of --held-out that are in --data, too: {len(shared)}, the first {min(shared)}; what is trained on "
            "is not held out: take them out of one"
        )


def look_alikes(train: Sequence[Example], test: Sequence[Example], tell: Tell) -> list[str]:
    """Lines about videos held out that look the same as another one, which is trained on or has another answer."""
    examples = [*train, *test]
    groups = video_groups(examples, tell)
    twins: dict[int, str] = {}
    for example in train:
        twins.setdefault(groups[example.video], example.video)
    learnt = {os.path.realpath(example.video) for example in train}  # parts of one file may be on both sides
    asked = sorted({example.video for example in test if os.path.realpath(example.video) not in learnt})
    seen = [video for video in asked if groups[video] in twins]
    lines = contradictions(examples, groups)
    if seen:
        pair = f"{seen[0]} as {twins[groups[seen[0]]]}"
        lines.append(f"videos held out that look the same as one that is trained on: {len(seen)}; the first: {pair}")
    return lines


def contradictions(examples: Sequence[Example], groups: Mapping[str, int]) -> list[str]:
    """A line where videos that look the same have other answers to the same question, where answers are labels."""
    if not _are_labels(examples):
        return []
    asked: dict[tuple[int, str], Example] = {}
    pairs = []
    for example in examples:
        before = asked.setdefault((groups[example.video], example.question), example)
        if before.video != example.video and before.answer != example.answer:
            pairs.append(f"{before.video} is {quoted(before.answer)}, {example.video} is {quoted(example.answer)}")
    if not pairs:
        return []
    return [f"videos that look the same as another, but have another answer: {len(pairs)}; the first: {pairs[0]}"]


def _are_labels(examples: Sequence[Example]) -> bool:
    """Whether answers are few, and so labels."""
    return len(answers_of(examples)) <= min(_MANY_ANSWERS, len(examples) // 2)


def _drawn(examples: Sequence[Example], groups: Mapping[str, int], seed: int) -> set[int]:
    """A fifth of the groups of each answer, by a hash of a file's name and folder.

    So more data moves none to the other side, and on another machine, where all lies elsewhere, it is the same fifth.
    """
    labels = _are_labels(examples)
    members: dict[str, list[int]] = collections.defaultdict(list)
    for example in examples:
        members[example.answer if labels else ""].append(groups[example.video])
    first = {group: path for path, group in reversed(sorted(groups.items()))}
    held: set[int] = set()
    for of_answer in members.values():
        order = sorted(set(of_answer), key=lambda group: (_hash(first[group], seed), first[group]))
        wanted = min(round(SHARE * len(order)), MOST // len(members) or 1)
        held |= set(order[: max(wanted, 1 if len(order) > 1 else 0)])
    return held


def _hash(path: str, seed: int) -> bytes:
    """A digest of the seed and the last two parts of a path."""
    return hashlib.sha256(f"{seed} {'/'.join(Path(path).parts[-2:])}".encode()).digest()


def video_groups(examples: Sequence[Example], tell: Tell) -> dict[str, int]:
    """path of a video -> the number of its group; videos that look the same are one group."""
    paths = sorted({example.video for example in examples})
    kinds = {example.video: example.conversation.media[0].kind for example in examples if example.conversation.media}
    prints, unread = _fingerprints(paths, kinds)
    if unread:
        first = next(iter(unread.values()))
        tell(f"warning: {len(unread)} of {len(paths)} videos cannot be read, and teach nothing; the first: {first}")
    parent = {path: path for path in paths}

    def root(path: str) -> str:
        while parent[path] != path:
            path = parent[path]
        return path

    seen = [path for path in paths if path in prints]
    bits = np.array([prints[path][0].ravel() for path in seen])
    levels = np.array([prints[path][1].ravel() for path in seen], np.float32)
    for i in range(len(seen)):
        near = (bits[i + 1 :] != bits[i]).sum(1) <= _BITS * 3
        near &= np.abs(levels[i + 1 :] - levels[i]).mean(1) <= _LEVELS
        for j in np.flatnonzero(near) + i + 1:
            a, b = root(seen[i]), root(seen[j])
            parent[max(a, b)] = min(a, b)
    numbers = {path: number for number, path in enumerate(paths)}
    return {path: numbers[root(path)] for path in paths}


def _fingerprints(
    paths: Sequence[str], kinds: Mapping[str, str]
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, str]]:
    """(path -> bits and mean colours of three frames, path -> why a medium cannot be read)."""
    decoder, found, unread = ThreadDecoder(usable_cpus()), {}, {}
    try:
        refs: dict[str, MediaRef] = {}
        for path in filter(None, paths):
            try:
                seconds = decoder.probe(path, kinds[path]).seconds if kinds[path] == "video" else 0.0
            except UserError as error:
                unread[path] = str(error)
                continue
            times = tuple(seconds * share for share in (0.1, 0.5, 0.9)) if kinds[path] == "video" else (0.0,)
            refs[path] = MediaRef(kinds[path], path, times)
        for path, outcome in zip(refs, decoder.decode(list(refs.values()), _SIDE), strict=True):
            if isinstance(outcome, UserError):
                unread[path] = str(outcome)
            else:
                cells = outcome.pixels.astype(np.float32)
                cells = cells.reshape(len(cells), _ROWS, _SIDE // _ROWS, _COLUMNS, _SIDE // _COLUMNS, 3).mean((2, 4))
                cells = np.repeat(cells, 3 // len(cells), axis=0)
                grey = cells.mean(-1)
                found[path] = (grey[:, :, 1:] > grey[:, :, :-1] + 1, cells)
    finally:
        decoder.close()
    return found, unread
