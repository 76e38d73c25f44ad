"""Bradley-Terry: choix where installed, its own optimality, and ratings with intervals."""

from __future__ import annotations

import numpy as np
import pytest

from fastmllm.eval.bradley_terry import POINTS, Game, ratings, sigmoid, strengths


def _wins(seed=0, players=5):
    return np.random.default_rng(seed).integers(1, 20, (players, players)) * (1 - np.eye(players))


def test_strengths_equal_choix():
    choix = pytest.importorskip("choix")
    wins = _wins()
    data = [(a, b) for a in range(5) for b in range(5) for _ in range(int(wins[a, b]))]
    theirs = choix.mm_pairwise(5, data, tol=1e-12)
    assert strengths(wins) == pytest.approx(theirs - theirs.mean(), abs=1e-6)


def test_at_the_maximum_expected_points_are_the_points():
    wins = _wins(1)
    found = strengths(wins)
    expected = ((wins + wins.T) * sigmoid(found[:, None] - found[None, :])).sum(1)
    assert expected == pytest.approx(wins.sum(1), rel=1e-7)
    assert found.mean() == pytest.approx(0.0, abs=1e-9)


def test_two_players_have_the_odds():
    assert np.diff(strengths(np.array([[0.0, 3.0], [1.0, 0.0]])))[0] == pytest.approx(-np.log(3))


def test_no_finite_maximum_is_said():
    beaten = np.array([[0.0, 2.0], [0.0, 0.0]])
    with pytest.raises(ValueError, match="give a prior above 0"):
        strengths(beaten)
    assert np.isfinite(strengths(beaten, prior=0.1)).all()
    apart = np.zeros((4, 4))
    apart[0, 1] = apart[1, 0] = apart[2, 3] = apart[3, 2] = 1.0
    with pytest.raises(ValueError, match="never met"):
        strengths(apart)


def test_ratings_do_not_depend_on_the_order_of_the_games():
    games = [Game("a", "b", float(i % 4 > 0), str(i)) for i in range(200)] + [Game("b", "c", 0.5, "x")]
    found = ratings(games, prior=0.0001, resamples=100)
    assert found["a"].value - found["b"].value == pytest.approx(POINTS * np.log(3), abs=1.0)
    assert found["a"].low < found["a"].value < found["a"].high
    assert found["b"].count == 201
    shuffled = ratings(games[::-1], prior=0.0001, resamples=2)
    assert shuffled["a"].value == pytest.approx(found["a"].value)
    assert ratings([]) == {}
