"""What a compressor reads and gives: visual tokens of many images, packed, and where each of them went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Grid = tuple[int, int, int]  # frames, rows, columns


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Visual tokens, one segment an image, tile or video.

    Args:
        x: (T, C) features.
        cu_seqlens: (S + 1,) int32, where segments begin, from 0 to T.
        seqlens: tokens of each segment, on the host, so that a budget never waits for the device.
        grid: frames, rows and columns of each segment, row-major; None once tokens are no grid any more.
        pos: (T, P) int64 position inside of the segment: P = 1, the index in the row-major grid, or 3 with M-RoPE.
        size: (T,) fp32 how many tokens of the grid each stands for; None: one each. log(size) is an attention bias.
        planes: further (T, ...) tensors that go where their token goes: DeepStack features, labels, ids.
    """

    x: Tensor
    cu_seqlens: Tensor
    seqlens: tuple[int, ...]
    grid: tuple[Grid, ...] | None
    pos: Tensor
    size: Tensor | None = None
    planes: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        total = sum(self.seqlens)
        if self.x.dim() != 2 or len(self.x) != total or len(self.cu_seqlens) != len(self.seqlens) + 1:
            raise ValueError(
                f"Tokens: x {tuple(self.x.shape)} and cu_seqlens {tuple(self.cu_seqlens.shape)} do not fit "
                f"{len(self.seqlens)} segments of {total} tokens"
            )
        named = {"pos": self.pos, "size": self.size, **{f"planes[{i}]": p for i, p in enumerate(self.planes)}}
        for name, plane in named.items():
            if plane is not None and (not plane.dim() or len(plane) != total):
                raise ValueError(f"Tokens: {name} {tuple(plane.shape)} must name each of the {total} tokens")
        if self.grid is not None and tuple(math.prod(g) for g in self.grid) != self.seqlens:
            raise ValueError(f"Tokens: grids {self.grid[:4]} do not fit segments of {self.seqlens[:4]} tokens")

    @classmethod
    def of(
        cls,
        x: Tensor,
        grids: Sequence[Sequence[int]] | None = None,
        pos: Tensor | None = None,
        planes: Sequence[Tensor] = (),
    ) -> Tokens:
        """Wrap features as encoders give them.

        Args:
            x: (I, N, C), or packed (T, C) with `grids`.
            grids: (h, w) or (t, h, w) of each segment, on the host; None: N is a square, or no grid if it is none.
            pos: (T, P); None: the index inside of the segment.
            planes: (T, ...) each.

        Raises:
            ValueError: the grids do not fit the tokens, or packed tokens come without.
        """
        if x.dim() == 3 and grids is None:
            side = math.isqrt(x.shape[1])
            grid = ((1, side, side),) * x.shape[0] if side * side == x.shape[1] else None
            seqlens = (x.shape[1],) * x.shape[0]
        elif grids is not None and x.dim() in (2, 3):
            grid = tuple((1, *g) if len(g) == 2 else tuple(g) for g in grids)  # type: ignore[misc]
            seqlens = tuple(math.prod(g) for g in grids)
        else:
            raise ValueError(f"Tokens: x must be (I, N, C), or (T, C) with grids, got {tuple(x.shape)}")
        cu_seqlens, index = boundaries(seqlens, x.device)
        return cls(
            x=x.flatten(0, -2), cu_seqlens=cu_seqlens, seqlens=seqlens, grid=grid,
            pos=index[:, None] if pos is None else pos, planes=tuple(planes),
        )  # fmt: skip

    def dense(self) -> Tensor:
        """Return (I, N, C) where all segments are of one length.

        Raises:
            ValueError: they are not.
        """
        if len(set(self.seqlens)) > 1:
            raise ValueError(f"Tokens: segments of {min(self.seqlens)} to {max(self.seqlens)} tokens are no batch")
        return self.x.view(len(self.seqlens), -1, self.x.shape[1])

    @property
    def longest(self) -> int:
        """Tokens of the longest segment."""
        return max(self.seqlens, default=0)

    def mass(self) -> Tensor:
        """Return (T,) fp32 how many tokens of the grid each stands for."""
        return torch.ones(len(self.x), device=self.x.device) if self.size is None else self.size

    def owners(self) -> Tensor:
        """Return (T,) int64 the segment of each token."""
        return segments(self.seqlens, self.x.device)

    def with_x(self, x: Tensor) -> Tokens:
        """Return the same tokens with other features (T, C')."""
        return replace(self, x=x)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Where tokens go: the sparse matrix M of y = M x.

    Args:
        keep: (K,) int64 the token that each output row stands at.
        assign: (T,) int64 the output row that each token is counted in, -1 for none; None: tokens are selected only.
    """

    keep: Tensor
    assign: Tensor | None = None


def cumulative(seqlens: Sequence[int], device: torch.device) -> Tensor:
    """Return cu_seqlens (S + 1,) int32, without waiting."""
    return torch.tensor([0, *seqlens]).cumsum(0).to(device, torch.int32, non_blocking=True)


def boundaries(seqlens: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cu_seqlens (S + 1,) int32 and the index of each token in its segment (T,) int64, without waiting."""
    cu_seqlens = torch.tensor([0, *seqlens]).cumsum(0)
    index = torch.arange(int(cu_seqlens[-1])) - cu_seqlens[:-1].repeat_interleave(
        torch.tensor(seqlens, dtype=torch.int64)
    )
    return cu_seqlens.to(device, torch.int32, non_blocking=True), index.to(device, non_blocking=True)


def segments(seqlens: Sequence[int], device: torch.device) -> Tensor:
    """Return the segment of each token (T,) int64, without waiting for the device."""
    lengths = torch.tensor(seqlens, dtype=torch.int64)
    return torch.arange(len(seqlens)).repeat_interleave(lengths).to(device, non_blocking=True)
