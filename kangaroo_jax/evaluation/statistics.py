"""How sure a score is: errors clustered by video, intervals, and paired comparison of two runs.

Questions about one video are not independent, so errors are summed by video before they are squared (Liang and Zeger
1986). An interval is Wilson's (1927) at the number of independent questions that would have the same error, so that it
stays between 0 and the best score, and is not empty where all answers are right.
"""

import collections
import dataclasses
import math
from collections.abc import Hashable, Sequence

_Z95, _Z80 = 1.959964, 0.841621  # quantiles of the normal distribution: 97.5% and 80%


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean, its standard error, its interval of 95%, and the smallest difference that two such means would show."""

    mean: float
    error: float
    low: float
    high: float
    smallest: float  # difference between two models that is found four times of five, at 5% of false alarms
    clusters: int


def estimate(
    values: Sequence[float], clusters: Sequence[Hashable], strata: Sequence[Hashable] = (), most: float = 1.0
) -> Estimate:
    """The mean of values from 0 to `most`, or with `strata` the mean of the strata's means.

    `clusters` says which values belong together. Without values the mean is 0 and the interval everything.
    """
    if not values:
        return Estimate(0.0, 0.0, 0.0, most, most, 0)
    mean, error, count = _clustered(values, clusters, strata)
    share, quantile = min(max(mean / most, 0.0), 1.0), _t95(count - 1)
    independent = share * (1 - share) / (error / most) ** 2 if error > 1e-12 else float(count)
    low, high = (most * end for end in _wilson(share, max(independent, 1.0), quantile))
    shown = error if error > 1e-12 else (high - low) / (2 * quantile)
    return Estimate(mean, error, low, high, min((_Z95 + _Z80) * math.sqrt(2) * shown, most), count)


def _clustered(
    values: Sequence[float], clusters: Sequence[Hashable], strata: Sequence[Hashable]
) -> tuple[float, float, int]:
    """(mean of the strata's means, its standard error clustered, the number of clusters)."""
    strata = strata or [None] * len(values)
    sizes, sums = collections.Counter(strata), collections.defaultdict[Hashable, float](float)
    for value, stratum in zip(values, strata, strict=True):
        sums[stratum] += value
    means = {stratum: sums[stratum] / size for stratum, size in sizes.items()}
    residues = collections.defaultdict[Hashable, float](float)
    for value, cluster, stratum in zip(values, clusters, strata, strict=True):
        residues[cluster] += (value - means[stratum]) / (sizes[stratum] * len(means))
    count = len(residues)
    error = math.sqrt(sum(r * r for r in residues.values()) * count / (count - 1)) if count > 1 else 0.0
    return sum(means.values()) / max(len(means), 1), error, count


def _wilson(share: float, count: float, z: float) -> tuple[float, float]:
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _t95(freedom: int) -> float:
    """The 97.5% quantile of Student's distribution (Cornish and Fisher 1938); within 1% from 3 degrees on."""
    z, n = _Z95, max(freedom, 1)
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


@dataclasses.dataclass(frozen=True)
class Difference:
    """What a second run scores more than a first on the same questions, with its interval of 95%."""

    mean: float
    error: float
    low: float
    high: float
    probability: float  # of a difference at least as large where the two are equally good
    smallest: float  # difference that this pairing finds four times of five
    better: int  # questions that only the second has right, or more right
    worse: int
    clusters: int


def compare(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable], strata: Sequence[Hashable] = ()
) -> Difference:
    """The paired difference, clustered by video. Raises ValueError where the lengths differ."""
    gains = [b - a for a, b in zip(first, second, strict=True)]
    mean, error, count = _clustered(gains, clusters, strata)
    half = _t95(count - 1) * error
    probability = math.erfc(abs(mean) / error / math.sqrt(2)) if error > 1e-12 else 1.0 if abs(mean) < 1e-12 else 0.0
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    low, high = max(mean - half, -1.0), min(mean + half, 1.0)
    return Difference(mean, error, low, high, probability, (_Z95 + _Z80) * error, better, worse, count)
