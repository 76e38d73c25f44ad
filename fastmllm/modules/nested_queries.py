"""Matryoshka query transformer: any first n of its queries are a set of n visual tokens (arXiv 2405.19315).

Shapes: M packed tokens of all images, N those of one, G^2 queries, n of them used, H heads of Dh, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from fastmllm.kernels.position_resample import position_resample
from fastmllm.modules.layer_norm import LayerNorm

Sizes = Sequence[tuple[int, int, int]]


class NestedQueries(nn.Module):
    """Weigh each image's tokens by where they are: query i reads the same mixture of places of every image.

    The keys are the positional table alone, so that the attention is a matrix of the grid, `weights`, and not of the
    image: one a grid and call, whatever the number of images. A query's row does not depend on how many there are.

    Args:
        width_in: of the visual tokens.
        width_out: of the language model.
        max_queries: a square, G^2.
        num_heads: divides `width_in`.

    Equal to MQT-LLaVA's connector (arXiv 2405.19315): LayerNorm eps 1e-6, no residual, a matrix without bias behind.
    """

    position: Tensor

    def __init__(self, width_in: int, width_out: int, *, max_queries: int = 256, num_heads: int = 16) -> None:
        super().__init__()
        side = math.isqrt(max(max_queries, 0))
        sizes = (width_in, width_out, max_queries, num_heads)
        if min(sizes) < 1 or side**2 != max_queries or width_in % num_heads or width_in % 4:
            raise ValueError(
                f"NestedQueries: sizes must be >= 1, max_queries a square, width_in a multiple of 4 and of num_heads, "
                f"got {width_in=}, {width_out=}, {max_queries=}, {num_heads=}"
            )
        self.side, self.heads = side, (num_heads, width_in // num_heads)
        self.queries = nn.Parameter(torch.empty(max_queries, width_in))
        self.register_buffer("position", sine_table(side, width_in))
        self.norm_query, self.norm_key, self.norm_value = (LayerNorm(width_in, 1e-6) for _ in range(3))
        self.q, self.k, self.v, self.proj = (nn.Linear(width_in, width_in) for _ in range(4))
        self.out = nn.Linear(width_in, width_out, bias=False)
        nn.init.trunc_normal_(self.queries, std=0.02)
        nn.init.normal_(self.out.weight, std=width_out**-0.5)
        for linear in (self.q, self.k, self.v, self.proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def weights(self, grid: tuple[int, int, int], count: int) -> Tensor:
        """Return the attention of the first `count` queries over a grid (t, h, w): (H, n, N) in the weights' dtype."""
        table = position_resample(self.position.unflatten(0, (self.side, self.side)), [grid], mode="bicubic")
        key = self.k(self.norm_key(table)).view(-1, *self.heads)
        query = self.q(self.norm_query(self.queries[:count] + self.position[:count])).view(-1, *self.heads)
        scores = query.transpose(0, 1) @ key.permute(1, 2, 0) * self.heads[1] ** -0.5
        return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)

    def forward(self, x: Tensor, grids: Sizes, counts: Sequence[int]) -> Tensor:
        """Read the tokens of all images.

        Args:
            x: (M, width_in) packed, row-major.
            grids: (t, h, w) of each image, on the host.
            counts: n of each image, on the host.

        Returns:
            (sum of n, width_out), an image's queries after another's.

        Raises:
            ValueError: more queries than there are, or grids that do not fit.
        """
        lengths = [math.prod(g) for g in grids]
        if x.dim() != 2 or sum(lengths) != len(x) or len(counts) != len(lengths):
            raise ValueError(f"NestedQueries: x {tuple(x.shape)}, grids {grids} and counts {counts} do not fit")
        if not counts:
            return x.new_zeros(0, self.out.out_features)
        if not 1 <= min(counts) <= max(counts) <= len(self.queries):
            raise ValueError(f"NestedQueries: counts {counts} must lie in 1..{len(self.queries)}")
        most = dict(sorted(zip(grids, counts, strict=True), key=lambda pair: pair[1]))  # of a grid, the largest stays
        weights = {grid: self.weights(grid, count) for grid, count in most.items()}
        value = self.v(self.norm_value(x)).view(-1, *self.heads)
        runs = [(grid, count, len(list(same))) for (grid, count), same in groupby(zip(grids, counts, strict=True))]
        parts = value.split([math.prod(grid) * images for grid, _, images in runs])
        read = [
            torch.einsum("hqk,ikhd->iqhd", weights[grid][:, :count], part.unflatten(0, (images, -1))).flatten(0, 1)
            for part, (grid, count, images) in zip(parts, runs, strict=True)
        ]
        return self.out(self.proj(torch.cat(read).flatten(1)))


def sine_table(side: int, width: int) -> Tensor:
    """Return sines and cosines of the column, then of the row, of a side x side grid: (side^2, width), as MAE's."""
    angles = torch.arange(side)[:, None] * 10000.0 ** -(torch.arange(width // 4) / (width // 4))  # (G, D / 4)
    one = torch.cat([angles.sin(), angles.cos()], 1)  # (G, D / 2)
    columns, rows = one[None].expand(side, -1, -1), one[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], 2).flatten(0, 1)
