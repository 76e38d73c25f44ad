"""What compressors that keep a grid share: which grid K tokens form, where each stands, what comes along with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmllm.compression.tokens import Grid, Plan, Tokens, boundaries
from fastmllm.kernels._runs import to_device


def grids_of(name: str, tokens: Tokens) -> tuple[Grid, ...]:
    """Return the grids.

    Raises:
        ValueError: the tokens have none.
    """
    if tokens.grid is None:
        raise ValueError(f"{name}: the tokens are no square grid, and none is given: Tokens.of(x, grids=...)")
    return tokens.grid


def pooled_grid(name: str, grid: Grid, keep: int) -> Grid:
    """Return the grid of `keep` tokens: of all factors that fit, those nearest to the shape of the grid.

    Raises:
        ValueError: no factors of K fit the rows and columns, or K is no multiple of the frames.
    """
    frames, rows, columns = grid
    each, rest = divmod(keep, frames)
    fits = [(r, each // r) for r in range(1, rows + 1) if each and each % r == 0 and each // r <= columns]
    if rest or not fits:
        raise ValueError(
            f"{name}: {keep} tokens do not form a grid within {frames} x {rows} x {columns}; take a product of two "
            "numbers"
        )
    shape = min(fits, key=lambda s: max(s[0] * columns / (s[1] * rows), s[1] * rows / (s[0] * columns)))
    return frames, *shape


def block_side(name: str, grids: Sequence[Grid], budgets: Sequence[int]) -> int:
    """Return the side s of the blocks that become one token each: K = N / s^2 of every image, one s for all.

    Raises:
        ValueError: an image has no such s, or two images have different ones.
    """
    sides = []
    for image, (grid, keep) in enumerate(zip(grids, budgets, strict=True)):
        frames, rows, columns = grid
        known = {rows * columns * frames // s**2: s for s in range(1, rows + 1) if rows % s == columns % s == 0}
        if keep not in known:
            raise ValueError(
                f"{name}: image {image} of {frames} x {rows} x {columns} tokens cannot become {keep}: blocks of s x s "
                f"leave {', '.join(map(str, known))}; with images of different sizes give keep as a fraction, 1 / s^2"
            )
        sides.append(known[keep])
    if len(set(sides)) > 1:
        raise ValueError(
            f"{name}: the images have blocks of different sides {sides}, but one width holds one; give keep as a "
            "fraction, 1 / s^2"
        )
    return sides[0] if sides else 1


def of_each(place: Callable[[Grid, Grid], Tensor], grids: Sequence[Grid], out: Sequence[Grid]) -> list[Tensor]:
    """Return `centres` or `blocks` of each image, made once for those that are alike."""
    pairs = list(zip(grids, out, strict=True))
    known = {pair: place(*pair) for pair in set(pairs)}
    return [known[pair] for pair in pairs]


def centres(grid: Grid, out: Grid) -> Tensor:
    """Return the token in the middle of each window, (K,) int64 in its segment, on the host."""
    frames, rows, columns = grid
    row, column = ((2 * torch.arange(k) + 1) * n // (2 * k) for n, k in zip(grid[1:], out[1:], strict=True))
    place = row[:, None] * columns + column  # (h', w')
    return (torch.arange(frames)[:, None, None] * rows * columns + place).flatten()


def blocks(grid: Grid, out: Grid) -> Tensor:
    """Return the window that each token is in, (N,) int64, on the host; `out` divides `grid`."""
    row, column = (torch.arange(n) // (n // k) for n, k in zip(grid[1:], out[1:], strict=True))
    place = row[:, None] * out[2] + column  # (h, w)
    return (torch.arange(grid[0])[:, None, None] * out[1] * out[2] + place).flatten()


def rebuild(
    tokens: Tokens,
    x: Tensor,
    budgets: tuple[int, ...],
    index: Sequence[Tensor],
    *,
    grid: tuple[Grid, ...] | None = None,
    assign: Sequence[Tensor] | None = None,
    mix: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tokens, Plan]:
    """Return the tokens that features computed from all of `tokens` are.

    Args:
        tokens: that went in.
        x: (K, C') that came out.
        budgets: K of each segment.
        index: of each segment, (K,) the token in it that each row stands at, on the host: it gives the position.
        grid: of what came out.
        assign: of each segment, (N,) the row that each token is counted in, on the host; None: there is no such.
        mix: what a floating plane (T, ...) becomes; None: that of the token that a row stands at.
    """
    device = x.device
    keep = _packed(index, tokens.seqlens, device)
    counted = None if assign is None else _packed(assign, budgets, device)
    planes = tuple(
        mix(plane) if mix is not None and plane.is_floating_point() else plane.index_select(0, keep)
        for plane in tokens.planes
    )
    out = Tokens(
        x=x, cu_seqlens=boundaries(budgets, device)[0], seqlens=budgets, grid=grid,
        pos=tokens.pos.index_select(0, keep), size=_sizes(tokens, budgets, counted), planes=planes,
    )  # fmt: skip
    return out, Plan(keep=keep, assign=counted)


def _packed(parts: Sequence[Tensor], seqlens: Sequence[int], device: torch.device) -> Tensor:
    """Count each segment's index from the start of all."""
    starts = [0]
    for n in seqlens:
        starts.append(starts[-1] + n)
    rows = [part + start for part, start in zip(parts, starts, strict=False)]
    return to_device(torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64), device)


def _sizes(tokens: Tokens, budgets: tuple[int, ...], assign: Tensor | None) -> Tensor:
    """Return (K,) fp32 the tokens behind each row: those counted in it, else an even share of its image's."""
    device = tokens.x.device
    if tokens.size is None:
        even = [torch.full((k,), n / k) for n, k in zip(tokens.seqlens, budgets, strict=True)]
        return to_device(torch.cat(even) if even else torch.zeros(0), device)
    if assign is not None:
        return torch.zeros(sum(budgets), device=device).index_add_(0, assign, tokens.size)
    totals = torch.zeros(len(budgets), device=device).index_add_(0, tokens.owners(), tokens.size)
    share = [torch.full((k,), 1 / k) for k in budgets]
    owner = [torch.full((k,), i) for i, k in enumerate(budgets)]
    return totals.index_select(0, to_device(torch.cat(owner), device)) * to_device(torch.cat(share), device)
