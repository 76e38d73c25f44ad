"""95 % intervals: Wilson for shares, bootstrap for means, both aware that questions about one image go together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054


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
    """Estimate a mean with a percentile bootstrap over clusters (2,000 resamples, seeded)."""
    n = len(values)
    if n == 0:
        return Estimate(0.0, 0.0, 0.0, 0)
    array = np.asarray(values, float)
    _, index = np.unique([str(c) for c in (clusters if clusters is not None else range(n))], return_inverse=True)
    sums, sizes = np.bincount(index, weights=array), np.bincount(index)
    draws = np.random.default_rng(seed).integers(0, len(sums), (2000, len(sums)))
    means = sums[draws].sum(1) / sizes[draws].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(array.mean()), float(low), float(high), n)
