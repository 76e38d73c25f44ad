"""Scores of tokens: what `topk` ranks by. All are fp32, without gradient, and an image's do not depend on its batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmllm.compression.compressor import Evidence, Probe
from fastmllm.compression.tokens import Tokens

Scorer = Callable[[Tokens, Evidence, tuple[int, ...]], Tensor]


def _probe(name: str, evidence: Evidence) -> Probe:
    if evidence.probe is None:
        raise ValueError(f"topk: scorer {name!r} needs the attention of a layer: Evidence(probe=...)")
    return evidence.probe


def cls_row(tokens: Tokens, evidence: Evidence, budgets: tuple[int, ...]) -> Tensor:
    """Attention of the class token, the mean over heads (FasterVLM, arXiv 2412.01818)."""
    return _probe("cls_row", evidence).received("first")


def received(tokens: Tokens, evidence: Evidence, budgets: tuple[int, ...]) -> Tensor:
    """Attention received from all rows, for towers without a class token."""
    return _probe("received", evidence).received("all")


def last_row(tokens: Tokens, evidence: Evidence, budgets: tuple[int, ...]) -> Tensor:
    """Attention of each question's last token in a language model (FastV, arXiv 2403.06764)."""
    probe = _probe("last_row", evidence)
    return probe.received("last") if probe.asking is None else probe.received(weight=probe.asking)


def text_rows(tokens: Tokens, evidence: Evidence, budgets: tuple[int, ...]) -> Tensor:
    """Attention of the rows of text in a language model, their sum (SparseVLM's raters, arXiv 2410.04417)."""
    probe = _probe("text_rows", evidence)
    if probe.text is None:
        raise ValueError("topk: scorer 'text_rows' needs a probe that names the rows of text: Probe(text=...)")
    return probe.received(weight=probe.text)


def norm(tokens: Tokens, evidence: Evidence, budgets: tuple[int, ...]) -> Tensor:
    """Euclidean length of the features."""
    return tokens.x.detach().float().norm(dim=1)


def external(tokens: Tokens, evidence: Evidence, budgets: tuple[int, ...]) -> Tensor:
    """Scores that the caller brings."""
    if evidence.scores is None or evidence.scores.shape != tokens.x.shape[:1]:
        raise ValueError(f"topk: scorer 'external' needs Evidence(scores=...) of shape ({len(tokens.x)},)")
    return evidence.scores.detach()


def random(tokens: Tokens, evidence: Evidence, budgets: tuple[int, ...]) -> Tensor:
    """A draw by the length of the image and the seed: the same alone and in a batch. The mandatory baseline."""
    seed = 1_000_003 * evidence.seed  # a generator on a CPU reads 32 bits of it
    drawn = {n: torch.rand(n, generator=torch.Generator().manual_seed(seed + n)) for n in set(tokens.seqlens)}
    return torch.cat([drawn[n] for n in tokens.seqlens]).to(tokens.x.device, non_blocking=True)


def grid(tokens: Tokens, evidence: Evidence, budgets: tuple[int, ...]) -> Tensor:
    """1 for K places spread evenly over the grid, else 0: rows evenly, columns evenly in each. A mandatory baseline."""
    grids = tokens.grid or tuple((1, 1, n) for n in tokens.seqlens)
    known = {pair: _spread(*pair) for pair in set(zip(grids, budgets, strict=True))}
    scores = [known[pair] for pair in zip(grids, budgets, strict=True)]
    return torch.cat(scores).to(tokens.x.device, non_blocking=True)


def _spread(grid: tuple[int, int, int], keep: int) -> Tensor:
    frames, rows, columns = grid
    lines = frames * rows  # a video is its frames below each other
    used = min(lines, max(-(-keep // columns), round((keep * lines / columns) ** 0.5)), keep)
    marks = torch.zeros(lines, columns)
    for i in range(used):
        here = keep * (i + 1) // used - keep * i // used
        row = (2 * i + 1) * lines // (2 * used)
        marks[row, [(2 * j + 1) * columns // (2 * here) for j in range(here)]] = 1.0
    return marks.flatten()


SCORERS: dict[str, Scorer] = {
    "cls_row": cls_row,
    "received": received,
    "last_row": last_row,
    "text_rows": text_rows,
    "norm": norm,
    "external": external,
    "random": random,
    "grid": grid,
}
ATTENTIVE = ("cls_row", "received", "last_row", "text_rows")  # these need a probe
