"""95 % intervals: Wilson for shares, bootstrap for means, both aware that questions about one image go together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054
RESAMPLES = 2000
CHUNK = 100  # resamples held in memory together


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval over `count` items."""

    value: float
    low: float
    high: float
    count: int

    def above(self, other: Estimate) -> bool:
        """Tell whether this interval lies wholly above the other."""
        return self.low > other.high


def share(correct: Sequence[bool], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Estimate a share with the Wilson interval; items of one cluster (image) count as correlated.

    Args:
        correct: one verdict an item.
        clusters: the item's image; None treats items as independent.

    Returns:
        the share; for no items 0 within [0, 1].

    Wilson, JASA 22 (1927); the clusters' design effect is the ratio of the cluster-robust to the binomial variance,
    never below 1 (Kish). With fewer than ten hits or misses that ratio is not to be had, and a cluster counts once.
    """
    n = len(correct)
    if n == 0:
        return Estimate(0.0, 0.0, 1.0, 0)
    p = float(np.mean(correct))
    effective = n / _design_effect(np.asarray(correct, float), clusters, p)
    centre = (p + Z95**2 / (2 * effective)) / (1 + Z95**2 / effective)
    half = Z95 / (1 + Z95**2 / effective) * np.sqrt(p * (1 - p) / effective + Z95**2 / (4 * effective**2))
    low, high = float(centre - half), float(centre + half)
    return Estimate(p, min(max(0.0, low), p), max(min(1.0, high), p), n)  # rounding must not leave p outside


def _design_effect(values: np.ndarray, clusters: Sequence[Hashable] | None, p: float) -> float:
    """Estimate how clustering inflates the variance; with few hits or misses a cluster counts as one item."""
    if clusters is None:
        return 1.0
    _, index = np.unique([str(c) for c in clusters], return_inverse=True)
    sizes = np.bincount(index)
    if len(values) * min(p, 1 - p) < 10:
        return len(values) / len(sizes)
    residuals = np.bincount(index, weights=values - p)
    return max(1.0, float((residuals**2).sum() / (len(values) * p * (1 - p))))


def mean(values: Sequence[float], clusters: Sequence[Hashable] | None = None, seed: int = 0) -> Estimate:
    """Estimate a mean with a percentile bootstrap over clusters (2,000 resamples, seeded); for no values 0 to 0."""
    return statistic(
        [{"sum": value, "n": 1.0} for value in values], lambda s: s["sum"] / s["n"] if s["n"] else 0.0, clusters, seed
    )


def statistic(
    counts: Sequence[Mapping[str, float]],
    value_of: Callable[[Mapping[str, float]], float],
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Estimate:
    """Estimate a function of sums (F1, BLEU, CHAIRi, a difference of two runs) by a bootstrap over clusters.

    Args:
        counts: what each item adds to the sums; a name that it lacks is 0.
        value_of: the statistic of the sums; it must take sums of 0.
        clusters: the item's image; None treats items as independent.
        seed: of the 2,000 resamples.

    Returns:
        the value with its percentile interval.
    """
    if not counts:
        return Estimate(0.0, 0.0, 0.0, 0)
    names = sorted({name for count in counts for name in count})
    _, index = np.unique(
        [str(c) for c in (clusters if clusters is not None else range(len(counts)))], return_inverse=True
    )
    sums = np.stack(
        [np.bincount(index, weights=[c.get(name, 0.0) for c in counts]) for name in names], axis=1
    )  # (C, K)
    rng = np.random.default_rng(seed)
    draws = []
    for begin in range(0, RESAMPLES, CHUNK):
        picked = rng.integers(0, len(sums), (min(CHUNK, RESAMPLES - begin), len(sums)))
        draws += [value_of(dict(zip(names, row.tolist(), strict=True))) for row in sums[picked].sum(1)]
    low, high = np.quantile(draws, (0.025, 0.975))
    value = value_of(dict(zip(names, sums.sum(0).tolist(), strict=True)))
    return Estimate(value, float(low), float(high), len(counts))
