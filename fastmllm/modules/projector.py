"""Token-level connector: an MLP from the encoder's width to the language model's, optionally after a pixel shuffle."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastmllm.modules.layer_norm import LayerNorm


class Projector(nn.Module):
    """Project visual tokens: [pixel shuffle] [LayerNorm] Linear GELU Linear [LayerNorm].

    Args:
        width_in: of the visual tokens.
        width_out: of the language model.
        hidden: width between the linear layers; None means `width_out`.
        shuffle: side of the block of tokens that becomes one; 1 keeps them.
        norm: whether a LayerNorm stands in front.
        out_std: None, or the standard deviation of the language model's embeddings: a LayerNorm behind starts there, so
            that a frozen language model reads the new tokens as it reads words from the first step on.

    Equal to LLaVA-1.5's `mlp2x_gelu` (arXiv 2310.03744) as is, to InternVL's connector with shuffle=2 and norm.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        *,
        hidden: int | None = None,
        shuffle: int = 1,
        norm: bool = False,
        out_std: float | None = None,
    ) -> None:
        super().__init__()
        hidden = width_out if hidden is None else hidden
        if min(width_in, width_out, hidden, shuffle) < 1:
            raise ValueError(f"Projector: sizes must be >= 1, got {width_in=}, {width_out=}, {hidden=}, {shuffle=}")
        self.shuffle = shuffle
        width = width_in * shuffle * shuffle
        self.norm = LayerNorm(width) if norm else None
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width_out)
        self.out_norm = None
        if out_std is not None:
            self.out_norm = LayerNorm(width_out)
            nn.init.constant_(self.out_norm.weight, out_std)

    def num_tokens(self, rows: int, columns: int) -> int:
        """Return the tokens that a grid of rows x columns becomes."""
        return (rows // self.shuffle) * (columns // self.shuffle)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Project the tokens of images of one size.

        Args:
            x: (..., N, width_in), row-major.
            grid: rows and columns with rows * columns = N; needed for a shuffle of a grid that is not square.

        Returns:
            (..., N / shuffle^2, width_out).

        Raises:
            ValueError: the grid does not fit the tokens or the shuffle.
        """
        if self.shuffle > 1:
            if grid is None:
                side = round(x.shape[-2] ** 0.5)
                grid = (side, side)
            x = pixel_shuffle(x, *grid, self.shuffle)
        if self.norm is not None:
            x = self.norm(x)
        x = self.fc2(F.gelu(self.fc1(x)))
        return x if self.out_norm is None else self.out_norm(x)


def pixel_shuffle(x: Tensor, rows: int, columns: int, factor: int) -> Tensor:
    """Turn each factor x factor block of tokens into one, its channels in (row, column, channel) order.

    Args:
        x: (..., N, D), N = rows * columns, row-major.
        rows, columns: of the grid, multiples of `factor`.
        factor: side of a block.

    Returns:
        (..., N / factor^2, D * factor^2), row-major.

    Raises:
        ValueError: the grid does not fit.

    Equal to InternVL's pixel_shuffle, version v2 (arXiv 2404.16821).
    """
    if x.dim() < 2 or x.shape[-2] != rows * columns or rows % factor or columns % factor:
        raise ValueError(
            f"pixel_shuffle: x {tuple(x.shape)} must hold rows * columns = {rows} * {columns} tokens, each a multiple "
            f"of {factor}; choose an image size that gives such a grid"
        )
    blocks = x.reshape(*x.shape[:-2], rows // factor, factor, columns // factor, factor, x.shape[-1])
    return blocks.transpose(-4, -3).reshape(*x.shape[:-2], -1, factor * factor * x.shape[-1])
