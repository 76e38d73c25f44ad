"""How many tokens each image keeps, known to the host before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

Budget = int | float | Sequence[int]


def check_budget(name: str, keep: Budget) -> None:
    """Refuse a budget that no image can have.

    Args:
        name: of the compressor, for messages.
        keep: as `tokens_to_keep` takes it.

    Raises:
        ValueError: K below 1, a fraction out of range, or what is no budget.
    """
    if (least := min(_numbers(name, keep), default=1)) < 1:
        raise ValueError(f"{name}: keep {least} must lie in 1..N, the tokens of an image")


def _numbers(name: str, keep: Budget) -> tuple[int, ...]:
    """Return the numbers of tokens that a budget names, none for a fraction."""
    if isinstance(keep, bool) or not isinstance(keep, int | float | Sequence) or isinstance(keep, str):
        raise ValueError(f"{name}: keep must be a number of tokens, a fraction or one number an image, got {keep!r}")
    if isinstance(keep, float):
        if not 0 < keep <= 1:
            raise ValueError(f"{name}: keep {keep} is a fraction and must lie in 0..1, above 0")
        return ()
    budgets = (keep,) if isinstance(keep, int) else tuple(keep)
    if any(isinstance(k, bool) or not hasattr(k, "__index__") for k in budgets):
        raise ValueError(f"{name}: keep {budgets[:8]} must be numbers of tokens")
    return budgets


def tokens_to_keep(name: str, keep: Budget, seqlens: Sequence[int]) -> tuple[int, ...]:
    """Return K of each segment.

    Args:
        name: of the compressor, for messages.
        keep: K for all, a fraction 0 < f <= 1 of each (rounded half up, at least 1), or one K a segment.
        seqlens: tokens of each segment.

    Raises:
        ValueError: K below 1 or above the tokens of its segment, a fraction out of range, or another number of budgets.
    """
    budgets = _numbers(name, keep)
    if isinstance(keep, float):
        return tuple(max(1, int(keep * n + 0.5)) for n in seqlens)
    budgets = budgets * len(seqlens) if isinstance(keep, int) else budgets
    if len(budgets) != len(seqlens):
        raise ValueError(f"{name}: {len(budgets)} budgets for {len(seqlens)} images")
    for image, (k, n) in enumerate(zip(budgets, seqlens, strict=True)):
        if not 1 <= k <= n:
            raise ValueError(f"{name}: keep {k} must lie in 1..{n}, the tokens of image {image}")
    return budgets
