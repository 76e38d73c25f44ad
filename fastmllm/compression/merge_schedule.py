"""Token Merging inside a vision transformer (Bolya et al., arXiv 2210.09461): every block merges some tokens.

Between attention and MLP of a block the most similar pairs merge, measured on the attention's keys; the next attention
adds the logarithm of each token's size to its scores. Works on trained weights as they are, and in training.
"""

from __future__ import annotations

from collections.abc import Sequence


def merge_schedule(seqlens: Sequence[int], budgets: Sequence[int], blocks: int, protected: int) -> list[list[int]]:
    """Spread the merges evenly over the blocks, as Token Merging's constant r does.

    Args:
        seqlens: tokens of each image in front of the first block.
        budgets: tokens of each behind the last one.
        blocks: how many there are.
        protected: tokens of every image that do not merge.

    Returns:
        For each block the pairs that merge in each image: at most half of what can.

    Raises:
        ValueError: the blocks are too few to get there.
    """
    left, schedule = list(seqlens), []
    for rest in reversed(range(blocks)):  # blocks behind this one
        merges = []
        for n, k in zip(left, budgets, strict=True):
            even, least = (
                -(-(n - k) // (rest + 1)),
                n - protected - ((k - protected) << rest),
            )  # later blocks at most halve
            merges.append(min(max(even, least), (n - protected) // 2))
        left = [n - r for n, r in zip(left, merges, strict=True)]
        schedule.append(merges)
    if left != list(budgets):
        raise ValueError(
            f"merge_schedule: {blocks} blocks that halve at the most do not get from {max(seqlens)} tokens to "
            f"{min(budgets)}"
        )
    return schedule
