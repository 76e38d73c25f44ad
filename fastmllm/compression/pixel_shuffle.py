"""Move space into channels: s x s neighbouring tokens become one of s^2 the width, and nothing is lost.

InternVL (arXiv 2312.14238, 2404.16821), Idefics3 (arXiv 2408.12637), SmolVLM (arXiv 2504.05299), Llama 4, and the
merger of Qwen2-VL (arXiv 2409.12191).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fastmllm.compression.budget import Budget
from fastmllm.compression.compressor import Compressor, Evidence, Mode, Position
from fastmllm.compression.regrid import block_side, blocks, centres, grids_of, of_each, rebuild
from fastmllm.compression.tokens import Grid, Plan, Tokens
from fastmllm.kernels.pixel_shuffle import ORDERS, pixel_shuffle


class PixelShuffle(Compressor):
    """Pack blocks of s x s tokens into one each, C channels into s^2 C; s follows from K = N / s^2.

    One s holds for all images; where they differ in size, give the fraction 1 / s^2. Floating planes are packed too
    (without norm), others are those of the token in the middle of the block.

    Args:
        keep: K, a fraction, or one K an image.
        order: "rows": row by row (InternVL's ps_version v2, Idefics3, Llama 4); "columns": out column by column
            (InternVL's v1); "merged": the encoder gives block after block already, each row by row (Qwen2-VL).
        norm: a LayerNorm in the same pass: None, "block" over the s^2 C of each new token (InternVL; `keep` must be the
            fraction 1 / s^2, which its size follows from), or "token" over the C of each old one (Qwen2-VL).
        width: C, where there is a norm.
        eps: of the norm.
        position: see `Compressor`; a block stands at its middle.
        mode: "clean" only: it is the published one.

    Raises:
        ValueError: options that do not fit together.
    """

    name = "pixel_shuffle"

    def __init__(
        self, keep: Budget, *, order: Literal["rows", "columns", "merged"] = "rows",
        norm: Literal["block", "token"] | None = None, width: int | None = None, eps: float = 1e-5,
        position: Position = "keep", mode: Mode = "clean",
    ) -> None:  # fmt: skip
        super().__init__(keep, position=position, mode=mode)
        if order not in ORDERS:
            raise ValueError(f"pixel_shuffle: order {order!r} is not one of {', '.join(ORDERS)}")
        if norm not in (None, "block", "token"):
            raise ValueError(f"pixel_shuffle: norm {norm!r} is not one of block, token, None")
        if (norm is None) != (width is None):
            raise ValueError(
                f"pixel_shuffle: norm {norm!r} and width {width}: a norm needs the width, nothing else does"
            )
        self.order, self.norm, self.eps = order, norm, eps
        self.weight = self.bias = None
        if width is not None:
            channels = width if norm == "token" else width * _side(keep) ** 2
            self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def reduce(self, tokens: Tokens, evidence: Evidence, budgets: tuple[int, ...]) -> tuple[Tokens, Plan | None]:
        grids = grids_of(self.name, tokens)
        side = block_side(self.name, grids, budgets)

        def packed(plane: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
            return pixel_shuffle(plane.reshape(len(plane), -1), grids, side, self.order, weight, bias, self.eps)

        out: tuple[Grid, ...] = tuple((t, h // side, w // side) for t, h, w in grids)
        if self.order == "merged":  # in the order of the blocks, each side^2 tokens
            index = [torch.arange(k) * side**2 + side // 2 * (side + 1) for k in budgets]
            assign = [torch.arange(n) // side**2 for n in tokens.seqlens]
        else:
            index, assign = of_each(centres, grids, out), of_each(blocks, grids, out)
        if self.order == "columns":
            index = [_turned(i, g) for i, g in zip(index, out, strict=True)]
            # row r, column c of the blocks stands at c * rows + r: a table of the old numbers, read at the new ones
            assign = [_turned(torch.arange(len(i)), (g[0], g[2], g[1]))[a]
                      for i, a, g in zip(index, assign, out, strict=True)]  # fmt: skip
            out = tuple((t, w, h) for t, h, w in out)
        x = packed(tokens.x, self.weight, self.bias)
        return rebuild(tokens, x, budgets, index, grid=out, assign=assign, mix=packed)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, order={self.order}, norm={self.norm}"


def _turned(index: Tensor, grid: Grid) -> Tensor:
    """Read a row-major (t, h, w) column by column."""
    return index.view(grid).transpose(1, 2).flatten()


def _side(keep: Budget) -> int:
    side = round(keep**-0.5) if isinstance(keep, float) and 0 < keep <= 1 else 0
    if not side or abs(keep * side**2 - 1) > 1e-6:  # type: ignore[operator]
        raise ValueError(f"pixel_shuffle: with norm 'block' keep must be a fraction 1 / s^2, got {keep!r}")
    return side
