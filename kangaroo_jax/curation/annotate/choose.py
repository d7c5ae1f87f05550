"""The refined subset: the best captions of every category (the paper's 6M of 60M)."""

import collections
import hashlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict


def choose(rows: Iterable[Mapping[str, Any]], clips: int, rules: ConfigDict) -> set[str]:
    """The ids of the chosen clips.

    Candidates have an ok caption in every requested language and a mean score of at least `min_score`. With
    `balance` every category gives the same number of clips, or all it has. Within a category the highest scores
    are taken; a hash of the id breaks ties, so that the result does not depend on the order of the rows.

    Args:
        rows: objects of captions.jsonl.
        clips: the number that `rules.share` refers to.
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
    """The number of clips that the rules ask for, out of `clips`."""
    return int(rules.count) or max(round(rules.share * clips), rules.at_least)


def level(sizes: Mapping[str, int], target: int) -> dict[str, int]:
    """The quota of each group, `target` in total: equal quotas, except that smaller groups give all they have."""
    quotas, left = dict.fromkeys(sizes, 0), target
    open_groups: Sequence[str] = sorted(sizes, key=lambda name: (sizes[name], name))
    for place, name in enumerate(open_groups):
        share, more = divmod(left, len(open_groups) - place)
        quotas[name] = min(sizes[name], share + (more > 0 and sizes[name] > share))
        left -= quotas[name]
    return quotas


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
