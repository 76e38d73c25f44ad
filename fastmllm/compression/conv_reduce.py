"""Bring the grid down with learned convolutions, so that each token left knows its neighbourhood.

C-Abstractor (Honeybee, arXiv 2312.06742), LDPv2 (MobileVLM V2, arXiv 2402.03766) and the 16-fold convolutions of
DeepSeek-OCR's encoder (arXiv 2510.18234).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastmllm.compression.budget import Budget
from fastmllm.compression.compressor import Mode, Position
from fastmllm.compression.pool import pool_plane
from fastmllm.compression.regrid import centres, grids_of, of_each, pooled_grid, rebuild
from fastmllm.compression.tokens import Grid, Plan, Tokens
from fastmllm.compression.trained import Trained
from fastmllm.modules.abstractor import CAbstractor
from fastmllm.modules.ldp import LDPv2


class ConvReduce(Trained):
    """Reduce every image's grid to K tokens with convolutions.

    Args:
        keep: K, a fraction, or one K an image: the product of the sides of a grid within the image's own; with
            "deepseek_ocr" a sixteenth, ceil(h / 4) * ceil(w / 4). Frames of a video are reduced each for itself.
        width: C of the tokens.
        width_out: of what comes out; None: the same.
        design: "c_abstractor": RegNet blocks around an average pool; "ldp": MLP, average pool, x plus its depthwise
            convolution; "deepseek_ocr": two 3 x 3 convolutions of stride 2, without bias or activation.
        position: see `Compressor`; a token stands at the middle of its window.
        mode: "clean" only.
        options: of "c_abstractor": `hidden` (width of its blocks, None for C), `depth`, `grid`.

    Raises:
        ValueError: unknown design.
        TypeError: an option that the design does not take.
    """

    name = "conv_reduce"

    def __init__(
        self, keep: Budget, width: int, *, width_out: int | None = None,
        design: Literal["c_abstractor", "ldp", "deepseek_ocr"] = "c_abstractor", position: Position = "keep",
        mode: Mode = "clean", **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(keep, width, width_out, position=position, mode=mode)
        if design not in _DESIGNS:
            raise ValueError(f"conv_reduce: design {design!r} is not one of {', '.join(_DESIGNS)}")
        self.design = design
        self.body: nn.Module = _DESIGNS[design](self.width, self.width_out, **options)

    def compute(self, tokens: Tokens, budgets: tuple[int, ...]) -> tuple[Tokens, Plan | None]:
        grids = grids_of(self.name, tokens)
        if self.design == "deepseek_ocr":
            out = tuple(_sixteenth(g, k) for g, k in zip(grids, budgets, strict=True))
        else:
            out = tuple(pooled_grid(self.name, g, k) for g, k in zip(grids, budgets, strict=True))
        sides = [(a[1:], b[1:]) for a, b in zip(grids, out, strict=True) for _ in range(a[0])]  # of each frame
        runs = [(len(list(same)), *pair) for pair, same in groupby(sides)]
        x = self.body(tokens.x, [(n, *side) for n, side, _ in runs], [side for *_, side in runs])
        return rebuild(
            tokens, x, budgets, of_each(centres, grids, out), grid=out,
            mix=lambda plane: pool_plane(plane, grids, out),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, design={self.design}"


class _TwoStrides(nn.Module):
    """Two 3 x 3 convolutions of stride 2, zeros around: 16 times fewer tokens (256 -> 512 -> 1024 channels there)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, 2 * width_in, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(2 * width_in, width_out, 3, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor, grid: Sequence[Grid], size: Sequence[tuple[int, int]]) -> Tensor:
        done = []
        for part, (images, h, w) in zip(x.split([n * h * w for n, h, w in grid]), grid, strict=True):
            pixels = part.view(images, h, w, -1).permute(0, 3, 1, 2)  # channels last
            y = self.conv2(self.conv1(pixels))
            done.append(y.permute(0, 2, 3, 1).reshape(-1, y.shape[1]))
        return torch.cat(done)


def _sixteenth(grid: Grid, keep: int) -> Grid:
    frames, rows, columns = grid
    out = frames, -(-rows // 4), -(-columns // 4)
    if keep != out[0] * out[1] * out[2]:
        raise ValueError(
            f"conv_reduce: deepseek_ocr makes {out[0] * out[1] * out[2]} of {frames} x {rows} x {columns} tokens, not "
            f"{keep}: two strides of 2"
        )
    return out


def _abstractor(width: int, width_out: int, *, hidden: int | None = None, **options: Any) -> CAbstractor:
    return CAbstractor(width, width_out, width=width if hidden is None else hidden, **options)


_DESIGNS: dict[str, Callable[..., nn.Module]] = {"c_abstractor": _abstractor, "ldp": LDPv2, "deepseek_ocr": _TwoStrides}
