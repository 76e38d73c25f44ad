"""Intervals: published values, clusters, and corners."""

from __future__ import annotations

import numpy as np
import pytest

from fastmllm.eval.intervals import mean, share, statistic


def test_wilson_equals_the_published_value():
    got = share([True] * 8 + [False] * 2)
    assert (got.value, got.low, got.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)


def test_corners():
    assert share([]).high == 1.0
    all_right = share([True] * 50)
    assert all_right.high == 1.0
    assert all_right.low == pytest.approx(0.9286, abs=1e-3)
    assert mean([]).count == 0


def test_questions_about_one_image_widen_the_interval():
    rng = np.random.default_rng(0)
    verdicts = np.repeat(rng.random(50) < 0.6, 4)  # four questions an image, all right or all wrong
    alone, clustered = share(list(verdicts)), share(list(verdicts), np.repeat(np.arange(50), 4))
    per_image = share(list(verdicts[::4]))
    assert clustered.high - clustered.low > 1.5 * (alone.high - alone.low)
    assert clustered.low == pytest.approx(per_image.low, abs=0.01)


def test_bootstrap_covers_the_mean_and_is_seeded():
    values = list(np.random.default_rng(1).normal(3.0, 1.0, 200))
    got = mean(values)
    assert got.low < 3.0 < got.high
    assert got == mean(values)


def test_above_needs_disjoint_intervals():
    assert share([True] * 90 + [False] * 10).above(share([True] * 50 + [False] * 50))
    assert not share([True] * 6 + [False] * 4).above(share([True] * 5 + [False] * 5))


def test_certainty_counts_images_not_questions():
    clustered = share([True] * 300, [i // 3 for i in range(300)])
    assert clustered.low == pytest.approx(share([True] * 100).low)


def test_clustered_intervals_cover():
    """Fully correlated questions near 1: the interval must hold what it promises."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        verdicts = np.repeat(rng.random(50) < 0.97, 4)
        got = share(list(verdicts), np.repeat(np.arange(50), 4))
        covered += got.low <= 0.97 <= got.high
    assert covered / 400 > 0.92


def test_a_function_of_sums_is_resampled_by_images():
    counts = [{"hit": float(i // 20 % 2), "n": 1.0} for i in range(200)] + [
        {"n": 0.0}
    ]  # a name that an item lacks is 0
    images = [i // 20 for i in range(201)]

    def rate(sums):
        return sums["hit"] / sums["n"] if sums["n"] else 0.0

    alone, together = statistic(counts, rate), statistic(counts, rate, images)
    assert (alone.value, together.value, together.count) == (0.5, 0.5, 201)
    assert together.high - together.low > 3 * (alone.high - alone.low)
    assert statistic(counts, rate, images) == together
    assert statistic([], rate).count == 0
