"""What every vision encoder here is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn


class Encoder(nn.Module):
    """Turn images into visual tokens.

    Attributes:
        width: channels of a token.
        stride: pixels that a token covers on a side.

    forward: pixels (I, H, W, 3) uint8 -> (I, (H / stride) * (W / stride), width), row-major, no class token,
    normalisation inside; H and W are multiples of `stride`.
    """

    width: int
    stride: int


def segment_bounds(lengths: Sequence[int], device: torch.device) -> tuple[Tensor, int]:
    """Return the cu_seqlens (S + 1,) int32 of packed segments, and the longest one, a host number.

    The copy to a GPU does not wait for it.
    """
    bounds = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
    return bounds.to(device, non_blocking=True), max(lengths, default=0)
