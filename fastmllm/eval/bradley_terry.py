"""Ratings from pairwise games: Bradley-Terry by minorisation-maximisation (Hunter, Annals of Statistics 32, 2004)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastmllm.eval.intervals import Estimate

POINTS = 400.0 / np.log(10.0)  # Elo's scale: 400 points are odds of 10
CENTRE = 1000.0


@dataclass(frozen=True, slots=True)
class Game:
    """Two players, what the first one scored (1, 0.5 or 0), and the question, which is what a bootstrap draws."""

    a: str
    b: str
    points: float
    question: str = ""


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + e^-x) without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def strengths(wins: np.ndarray, prior: float = 0.0, tolerance: float = 1e-10, steps: int = 10_000) -> np.ndarray:
    """Return the log-strengths of players, mean 0.

    Args:
        wins: (P, P) points of the row's player against the column's; a tie is half a point for each.
        prior: ties that every two players are taken to have played beside these games. 0 is the maximum likelihood,
            which a player without a win, or one who never met the others, does not have.
        tolerance: largest change of a log-strength at the end.
        steps: at most.

    Raises:
        ValueError: no finite maximum without a prior.
    """
    players = len(wins)
    wins = wins + prior * 0.5 * (1 - np.eye(players))
    if not _connected(wins):
        raise ValueError("bradley_terry: some players never beat, or never met, the others; give a prior above 0")
    games, won = wins + wins.T, wins.sum(1)
    strength = np.ones(players)
    for _ in range(steps):
        new = won / (games / (strength[:, None] + strength[None, :])).sum(1)
        new /= np.exp(np.log(new).mean())
        change = np.abs(np.log(new / strength)).max()
        strength = new
        if change < tolerance:
            break
    return np.log(strength)


def ratings(games: Sequence[Game], prior: float = 0.1, resamples: int = 500, seed: int = 0) -> dict[str, Estimate]:
    """Rate players on Elo's scale around 1,000, with a percentile bootstrap over questions.

    Unlike running Elo the order of the games has no part in it.

    Args:
        games: of any number of players.
        prior: of `strengths`; small, it keeps resamples finite in which somebody wins nothing.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    names = sorted({name for game in games for name in (game.a, game.b)})
    if not names:
        return {}
    place = {name: i for i, name in enumerate(names)}
    questions = {q: i for i, q in enumerate(dict.fromkeys(game.question for game in games))}
    each = np.zeros((len(questions), len(names), len(names)))
    for game in games:
        a, b, q = place[game.a], place[game.b], questions[game.question]
        each[q, a, b] += game.points
        each[q, b, a] += 1 - game.points
    rng = np.random.default_rng(seed)
    drawn = (np.bincount(rng.integers(0, len(each), len(each)), minlength=len(each)) for _ in range(resamples))
    draws = np.stack([strengths(np.tensordot(times, each, 1), prior, tolerance=1e-6) for times in drawn])
    value = CENTRE + POINTS * strengths(each.sum(0), prior)
    low, high = CENTRE + POINTS * np.quantile(draws, (0.025, 0.975), axis=0)
    counts = {n: sum(n in (g.a, g.b) for g in games) for n in names}
    return {n: Estimate(float(value[i]), float(low[i]), float(high[i]), counts[n]) for n, i in place.items()}


def _connected(wins: np.ndarray) -> bool:
    """Tell whether everybody has beaten everybody through others: what makes the likelihood's maximum finite."""
    reach = (wins > 0) | np.eye(len(wins), dtype=bool)
    for _ in range(len(wins)):
        reach = reach | (reach.astype(int) @ reach.astype(int) > 0)
    return bool(reach.all())
