"""The refined subset: the best captions of every category (the paper's 6M of 60M)."""

import collections
import hashlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict


def choose(rows: Iterable[Mapping[str, Any]], clips: int, rules: ConfigDict) -> set[str]:
    """The ids of the clips that are chosen.

    Candidates have a caption that is ok in every language they were asked in, and a mean score of at least
    `min_score`. With `balance` every category gives the same number, or all it has; within one the highest
    scores are taken, and ties are broken by a hash of the id, so that the order of the rows changes nothing.

    Args:
        rows: objects of captions.jsonl.
        clips: of how many `rules.share` is a share.
    """
    scores: dict[str, list[float]] = {}
    categories: dict[str, str] = {}
    bad = set()
    for row in rows:
        if row["outcome"] != "ok":
            bad.add(row["clip"])
            continue
        scores.setdefault(row["clip"], []).append(row["scores"]["score"])
        categories[row["clip"]] = row.get("category") or ""
    means = {clip: statistics.fmean(found) for clip, found in scores.items() if clip not in bad}
    order = sorted((clip for clip in means if means[clip] >= rules.min_score), key=lambda c: (-means[c], _hash(c)))
    target = min(rule_size(clips, rules), len(order))
    if not rules.balance:
        return set(order[:target])
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for clip in order:
        groups[categories[clip]].append(clip)
    quotas = level({name: len(group) for name, group in groups.items()}, target)
    return {clip for name, group in groups.items() for clip in group[: quotas[name]]}


def rule_size(clips: int, rules: ConfigDict) -> int:
    """How many of so many clips the rules want, if there are enough good ones."""
    return rules.count or max(round(rules.share * clips), rules.at_least)


def level(sizes: Mapping[str, int], target: int) -> dict[str, int]:
    """How many of each group, `target` together: the same number of each, and all of those that have fewer."""
    quotas, left = dict.fromkeys(sizes, 0), target
    open_groups: Sequence[str] = sorted(sizes, key=lambda name: (sizes[name], name))
    for place, name in enumerate(open_groups):
        share, more = divmod(left, len(open_groups) - place)
        quotas[name] = min(sizes[name], share + (more > 0 and sizes[name] > share))
        left -= quotas[name]
    return quotas


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
