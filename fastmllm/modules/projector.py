"""Token-level connectors: an MLP or a matrix to the language model's width, optionally behind a pixel shuffle."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastmllm.kernels.pixel_shuffle import pixel_shuffle
from fastmllm.modules.gelu_mlp import GeluMLP
from fastmllm.modules.layer_norm import LayerNorm

Grid = Sequence[Sequence[int]]


class Projector(nn.Module):
    """Project visual tokens: [pixel shuffle] [LayerNorm] Linear GELU Linear [LayerNorm].

    Args:
        width_in: of the visual tokens; of several encoder layers side by side, the sum.
        width_out: of the language model.
        hidden: width between the linear layers; None means `width_out`.
        shuffle: side of the block of tokens that becomes one; 1 keeps them.
        norm: whether a LayerNorm stands in front, behind the shuffle.
        out_std: None, or the standard deviation of the language model's embeddings: a LayerNorm behind starts there, so
            that a frozen language model reads the new tokens as it reads words from the first step on.
        activation: "gelu", "gelu_tanh" or "quick_gelu".
        bias: whether the linear layers have one.
        norm_eps: of the LayerNorm in front.

    Equal, by family: as is, LLaVA-1.5's `mlp2x_gelu` (arXiv 2310.03744), LLaVA-NeXT's and LLaVA-OneVision's; with norm,
    VipLLaVA's over the concatenated layers; with shuffle=2 and norm, InternVL's (ps_version v2).
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
        activation: str = "gelu",
        bias: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        hidden = width_out if hidden is None else hidden
        if min(width_in, width_out, hidden, shuffle) < 1:
            raise ValueError(f"Projector: sizes must be >= 1, got {width_in=}, {width_out=}, {hidden=}, {shuffle=}")
        self.shuffle = shuffle
        width = width_in * shuffle * shuffle
        self.norm = _ShuffledNorm(width, norm_eps, shuffle) if norm else None
        self.mlp = GeluMLP(width, hidden, activation, width_out=width_out, bias=bias)
        for parameter, fan_in in zip(self.mlp.parameters(), (width, hidden) * 2, strict=False):
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)  # nn.Linear's: connectors learn from scratch
        self.out_norm = None
        if out_std is not None:
            self.out_norm = LayerNorm(width_out)
            nn.init.constant_(self.out_norm.weight, out_std)

    def num_tokens(self, rows: int, columns: int) -> int:
        """Return the tokens that a grid of rows x columns becomes."""
        return (rows // self.shuffle) * (columns // self.shuffle)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Project the tokens of all images.

        Args:
            x: (..., width_in); where there is a shuffle, (I, N, width_in) or (M, width_in) packed, row-major.
            grid: (h, w) or (t, h, w) of each image, on the host; read by the shuffle only. None for (I, N, width_in)
                means a square, and one entry means that all images have it.

        Returns:
            (..., width_out), with 1 / shuffle^2 as many tokens.

        Raises:
            ValueError: the grids do not fit the tokens or the shuffle.
        """
        if self.norm is not None:
            x = self.norm(x, grid)
        elif self.shuffle > 1:
            x = pixel_shuffle(x, grid, self.shuffle)
        x = self.mlp(x)
        return x if self.out_norm is None else self.out_norm(x)


class _ShuffledNorm(LayerNorm):
    """A LayerNorm over shuffled tokens, in the pass that shuffles them."""

    def __init__(self, width: int, eps: float, factor: int) -> None:
        super().__init__(width, eps)
        self.factor = factor

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        if self.factor == 1:
            return super().forward(x)
        return pixel_shuffle(x, grid, self.factor, "rows", self.weight, self.bias, self.eps)


class ShuffleProjector(nn.Module):
    """Project visual tokens by a pixel shuffle and one linear layer without bias.

    Args:
        width_in: of the visual tokens.
        width_out: of the language model.
        shuffle: side of the block of tokens that becomes one.

    Equal to the connectors of Idefics3 (arXiv 2408.12637) and SmolVLM (2504.05299) with shuffle=2 or more, and to
    nanoVLM's with shuffle=4.
    """

    def __init__(self, width_in: int, width_out: int, *, shuffle: int = 2) -> None:
        super().__init__()
        if min(width_in, width_out, shuffle) < 1:
            raise ValueError(f"ShuffleProjector: sizes must be >= 1, got {width_in=}, {width_out=}, {shuffle=}")
        self.shuffle = shuffle
        self.proj = nn.Linear(width_in * shuffle * shuffle, width_out, bias=False)
        nn.init.normal_(self.proj.weight, std=0.02)

    def num_tokens(self, rows: int, columns: int) -> int:
        """Return the tokens that a grid of rows x columns becomes."""
        return (rows // self.shuffle) * (columns // self.shuffle)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Project `x` (I, N, width_in) or (M, width_in) packed, as `Projector.forward` does."""
        return self.proj(pixel_shuffle(x, grid, self.shuffle))
