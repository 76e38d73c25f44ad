"""One round of Token Merging (arXiv 2210.09461, Appendix D) on dense matrices, token by token."""

from __future__ import annotations

import torch


def merge_round(
    x: torch.Tensor, keys: torch.Tensor, size: torch.Tensor, r: int, protected: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the r most similar pairs of one image.

    Args:
        x: (N, C).
        keys: (N, D) the mean over heads.
        size: (N,) what each stands for.
        r: pairs.
        protected: tokens in front that stay out of it.

    Returns:
        (N - r, C) and (N - r,).
    """
    metric = torch.nn.functional.normalize(keys, dim=-1)
    a, b = range(0, len(x), 2), range(1, len(x), 2)
    similarity = metric[a] @ metric[b].T
    similarity[[i for i, at in enumerate(a) if at < protected]] = -torch.inf
    similarity[:, [i for i, at in enumerate(b) if at < protected]] = -torch.inf
    best, partner = similarity.max(1)
    chosen = best.argsort(descending=True)[:r].tolist()
    rows = []
    for at in range(len(x)):
        if at % 2 == 0 and at // 2 in chosen:
            continue
        members = [at] + [a[i] for i in chosen if at % 2 and int(partner[i]) == at // 2]
        mass = size[members]
        rows.append(((x[members] * mass[:, None]).sum(0) / mass.sum(), mass.sum()))
    return torch.stack([row for row, _ in rows]), torch.stack([mass for _, mass in rows])
