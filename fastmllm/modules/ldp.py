"""MobileVLM V2's lightweight downsample projector."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastmllm.kernels._runs import Grid, image_runs
from fastmllm.kernels.token_pool import token_pool
from fastmllm.modules.depthwise_conv import DepthwiseConv
from fastmllm.modules.gelu_mlp import GeluMLP


class LDPv2(nn.Module):
    """Project visual tokens and keep a quarter of them: MLP, average of 2 x 2, x + depthwise convolution of x.

    The convolution tells tokens where they are (positional encoding generator, arXiv 2102.10882).

    Args:
        width_in: of the visual tokens.
        width_out: of the language model.
        pool: side of the block of tokens that is averaged.

    Equal to LDPNetV2Projector (MobileVLM V2, arXiv 2402.03766), which averages 24 x 24 tokens to 12 x 12.
    """

    def __init__(self, width_in: int, width_out: int, *, pool: int = 2) -> None:
        super().__init__()
        if min(width_in, width_out, pool) < 1:
            raise ValueError(f"LDPv2: sizes must be >= 1, got {width_in=}, {width_out=}, {pool=}")
        self.pool = pool
        self.mlp = GeluMLP(width_in, width_out, width_out=width_out)
        self.conv = DepthwiseConv(width_out)

    def num_tokens(self, rows: int, columns: int) -> int:
        """Return the tokens that a grid of rows x columns becomes."""
        return (rows // self.pool) * (columns // self.pool)

    def forward(self, x: Tensor, grid: Grid | None = None, size: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """Project the tokens of all images.

        Args:
            x: (M, width_in) packed, row-major, or (I, N, width_in).
            grid: (h, w) or (t, h, w) of each image, on the host, multiples of `pool`; None for (I, N, width_in) means a
                square, and one entry that all images have it.
            size: (h', w') that each entry of the grid is averaged to, on the host; None for the blocks of `pool`.

        Returns:
            (M / pool^2, width_out), or (I, N / pool^2, width_out), or as many tokens as `size` says.

        Raises:
            ValueError: the grids do not fit the tokens or the pool.
        """
        runs = image_runs("ldp_v2", x, grid)
        if size is None:
            if any(h % self.pool or w % self.pool for _, h, w in runs):
                raise ValueError(f"LDPv2: grids {[run[1:] for run in runs]} must be multiples of pool {self.pool}")
            size = [(h // self.pool, w // self.pool) for _, h, w in runs]
        y = token_pool(self.mlp(x).flatten(0, -2), runs, size=size)
        y = y + self.conv(y, [(n, *target) for (n, _, _), target in zip(runs, size, strict=True)])
        if x.dim() == 2:
            return y
        return y.view(x.shape[0], y.shape[0] // x.shape[0] if x.shape[0] else size[0][0] * size[0][1], y.shape[1])
