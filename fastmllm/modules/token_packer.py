"""TokenPacker: each coarse token fetches the detail of its own region from several encoder layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmllm.kernels._runs import Grid, image_runs
from fastmllm.kernels.cross_attention import cross_attention
from fastmllm.kernels.pixel_shuffle import pixel_shuffle
from fastmllm.kernels.token_pool import token_pool
from fastmllm.modules.gelu_mlp import GeluMLP
from fastmllm.modules.layer_norm import LayerNorm


class _RegionNorm(LayerNorm):
    """A LayerNorm that puts the tokens of each region next to each other in the same pass."""

    def forward(self, x: Tensor, grid: Grid | None = None, region: int = 1) -> Tensor:
        """Normalise `x` (M, D) and reorder its rows: a region's, row by row, then the next one's."""
        return pixel_shuffle(x, grid, region, "rows", self.weight, self.bias, self.eps).view(-1, x.shape[1])


class TokenPacker(nn.Module):
    """Bring region x region tokens down to one: the bilinear coarse token attends to the fine tokens of its region.

    Args:
        width_in: of the encoder's tokens.
        width_out: of the language model.
        levels: encoder layers that the fine tokens concatenate (12, 16, 22 and 23 of CLIP ViT-L in the paper).
        width: of the attention; None for `width_in`.
        head_dim: width of a head; divides `width`.
        region: side of a region, 2, 3 or 4 in the paper.

    Equal to the TokenPacker of arXiv 2407.02392: LayerNorm eps 1e-6; query without bias; no residual.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        *,
        levels: int = 4,
        width: int | None = None,
        head_dim: int = 128,
        region: int = 2,
    ) -> None:
        super().__init__()
        width = width_in if width is None else width
        if min(width_in, width_out, levels, width, head_dim, region) < 1 or width % head_dim:
            raise ValueError(
                f"TokenPacker: sizes must be >= 1 and head_dim divide width, got {width_in=}, {width_out=}, {levels=}, "
                f"{width=}, {head_dim=}, {region=}"
            )
        self.region, self.heads = region, (width // head_dim, head_dim)
        self.to_query = nn.Linear(width_in, width, bias=False)
        self.to_key = GeluMLP(levels * width_in, width, width_out=width)
        self.to_value = GeluMLP(levels * width_in, width, width_out=width)
        self.norm_query = LayerNorm(width, 1e-6)
        self.norm_key = _RegionNorm(width, 1e-6)
        self.norm_value = _RegionNorm(width, 1e-6)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.mlp = GeluMLP(width, width_out, width_out=width_out)
        for linear in (self.to_query, self.q, self.k, self.v, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def num_tokens(self, rows: int, columns: int) -> int:
        """Return the tokens that a grid of rows x columns becomes."""
        return (rows // self.region) * (columns // self.region)

    def forward(self, x: Tensor, fine: Tensor, grid: Grid | None = None, region: int | None = None) -> Tensor:
        """Pack the tokens of all images.

        Args:
            x: (M, width_in) packed, row-major, or (I, N, width_in): the layer that coarse tokens come from.
            fine: (..., levels * width_in), the same tokens in several layers side by side.
            grid: (h, w) or (t, h, w) of each image, on the host, multiples of `region`; None for (I, N, width_in) means
                a square, and one entry that all images have it.
            region: side of a region in this call; None for the module's.

        Returns:
            (M / region^2, width_out), or (I, N / region^2, width_out).

        Raises:
            ValueError: the grids do not fit the tokens or the region, or `x` and `fine` differ in tokens.
        """
        if x.shape[:-1] != fine.shape[:-1]:
            raise ValueError(f"TokenPacker: x {tuple(x.shape)} and fine {tuple(fine.shape)} differ in tokens")
        runs, side = image_runs("token_packer", x, grid), self.region if region is None else region
        if any(h % side or w % side for _, h, w in runs):
            raise ValueError(f"TokenPacker: grids {[run[1:] for run in runs]} must be multiples of region {side}")
        coarse = token_pool(x.flatten(0, -2), runs, size=[(h // side, w // side) for _, h, w in runs], mode="bilinear")
        fine = fine.flatten(0, -2)
        q = self.q(self.norm_query(self.to_query(coarse))).view(-1, *self.heads)
        k = self.k(self.norm_key(self.to_key(fine), runs, side)).view(-1, *self.heads)
        v = self.v(self.norm_value(self.to_value(fine), runs, side)).view(-1, *self.heads)
        start = torch.arange(q.shape[0], dtype=torch.int32, device=q.device) * side**2
        y = cross_attention(q, k, v, start, start + side**2, max_seqlen_q=1, max_seqlen_k=side**2)
        y = self.mlp(self.proj(y.flatten(1)))
        return y if x.dim() == 2 else y.view(x.shape[0], x.shape[1] // side**2, y.shape[1])
