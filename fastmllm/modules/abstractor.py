"""Honeybee's C-Abstractor: convolutions around an average pool, so that few tokens keep where things are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmllm.kernels._runs import Grid, image_runs
from fastmllm.kernels.position_resample import position_resample
from fastmllm.kernels.token_pool import token_pool
from fastmllm.modules.depthwise_conv import DepthwiseConv
from fastmllm.modules.layer_norm import LayerNorm

Runs = Sequence[tuple[int, int, int]]


class _Block(nn.Module):
    """RegNet's bottleneck with squeeze and excitation (arXiv 2003.13678), LayerNorm over channels and SiLU."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        squeezed = round(width_in * 0.25)
        self.conv1 = nn.Linear(width_in, width, bias=False)
        self.norm1 = LayerNorm(width)
        self.conv2 = DepthwiseConv(width, bias=False)
        self.norm2 = LayerNorm(width)
        self.squeeze = nn.Linear(width, squeezed)
        self.excite = nn.Linear(squeezed, width)
        self.conv3 = nn.Linear(width, width, bias=False)
        self.norm3 = LayerNorm(width)
        self.shortcut = nn.Linear(width_in, width, bias=False) if width_in != width else None
        self.shortcut_norm = LayerNorm(width) if width_in != width else None

    def forward(self, x: Tensor, runs: Runs) -> Tensor:
        y = F.silu(self.norm1(self.conv1(x)))
        y = F.silu(self.norm2(self.conv2(y, runs)))
        gate = self.excite(F.silu(self.squeeze(token_pool(y, runs, size=(1, 1))))).sigmoid()  # (I, D)
        y = self.norm3(self.conv3(y * _each_token(gate, runs)))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x))
        return F.silu(x + y)


def _each_token(gate: Tensor, runs: Runs) -> Tensor:
    """Repeat the row (I, D) of an image for each of its tokens: (M, D)."""
    parts = gate.split([n for n, _, _ in runs])
    return torch.cat([part.repeat_interleave(h * w, 0) for part, (_, h, w) in zip(parts, runs, strict=True)])


class CAbstractor(nn.Module):
    """Turn each image's grid into side x side tokens: positions, blocks, adaptive average, blocks, MLP with SiLU.

    Args:
        width_in: of the visual tokens.
        width_out: of the language model.
        width: of the blocks.
        depth: blocks before, and behind, the pool.
        side: of the grid of tokens that comes out.
        grid: side of the learned position table; other grids resample it, bilinearly.

    Equal to Honeybee's CAbstractor (arXiv 2312.06742) on grids of the table's size, with its 3 + 3 blocks, no norm in
    front, no extra tokens and an MLP of two layers.
    """

    def __init__(
        self, width_in: int, width_out: int, *, width: int = 1024, depth: int = 3, side: int = 12, grid: int = 24
    ) -> None:
        super().__init__()
        if min(width_in, width_out, width, depth, side, grid) < 1:
            raise ValueError(
                f"CAbstractor: sizes must be >= 1, got {width_in=}, {width_out=}, {width=}, {depth=}, {side=}, {grid=}"
            )
        self.side, self.grid = side, grid
        self.position = nn.Parameter(torch.empty(grid * grid, width_in))
        self.before = nn.ModuleList(_Block(width if k else width_in, width) for k in range(depth))
        self.behind = nn.ModuleList(_Block(width, width) for _ in range(depth))
        self.fc1 = nn.Linear(width, width_out)
        self.fc2 = nn.Linear(width_out, width_out)
        nn.init.trunc_normal_(self.position, std=0.02)

    def num_tokens(self, rows: int, columns: int) -> int:
        """Return the tokens that a grid of rows x columns becomes."""
        return self.side**2

    def forward(self, x: Tensor, grid: Grid | None = None, size: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """Abstract the tokens of all images.

        Args:
            x: (M, width_in) packed, row-major, or (I, N, width_in).
            grid: (h, w) or (t, h, w) of each image, on the host; None for (I, N, width_in) means a square, and one
                entry that all images have it.
            size: (h', w') that each entry of the grid becomes, on the host; None for side x side.

        Returns:
            (I * side^2, width_out), or (I, side^2, width_out), or as many tokens as `size` says.

        Raises:
            ValueError: the grids do not fit the tokens.
        """
        runs = image_runs("c_abstractor", x, grid)
        y = x.flatten(0, -2)
        if not y.shape[0]:
            return y.new_zeros(*x.shape[:-2], 0 if x.dim() == 2 else self.side**2, self.fc2.out_features)
        table = self.position.unflatten(0, (self.grid, self.grid))
        y = y + position_resample(table, runs, mode="bilinear").to(y.dtype)
        for block in self.before:
            y = block(y, runs)
        size = [(self.side, self.side)] * len(runs) if size is None else size
        y = token_pool(y, runs, size=size)
        pooled = [(n, *target) for (n, _, _), target in zip(runs, size, strict=True)]
        for block in self.behind:
            y = block(y, pooled)
        y = self.fc2(F.silu(self.fc1(y)))
        return y if x.dim() == 2 else y.unflatten(0, (x.shape[0], -1))
