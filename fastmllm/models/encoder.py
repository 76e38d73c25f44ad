"""What every vision encoder here is."""

from __future__ import annotations

from torch import nn


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
