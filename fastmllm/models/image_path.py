"""The image half of a model: what a processor's batch holds of images, and what they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmllm.data.resolution.plan import Plan
from fastmllm.models import tower
from fastmllm.models.tower import Features, Stored

if TYPE_CHECKING:
    from fastmllm.models.feature_store import FeatureStore


@dataclass(frozen=True, kw_only=True, slots=True)
class Visual:
    """What images become.

    Args:
        tokens: (N, D) of all images, packed.
        planes: further (N, D), added behind the first layers of the language model (Qwen3-VL's DeepStack).
        across: (M, Dm) of another encoder, which layers look at while `tokens` stand in the text (CogAgent).
    """

    tokens: Tensor
    planes: tuple[Tensor, ...] = ()
    across: Tensor | None = None

    def at(self, rows: Tensor, across: Tensor | None) -> Visual:
        """Return the tokens as the places of a batch show them: `rows` of the tokens, `across` of the other encoder."""
        seen = None if self.across is None or across is None else self.across.index_select(0, across)
        planes = tuple(plane.index_select(0, rows) for plane in self.planes)
        return Visual(tokens=self.tokens.index_select(0, rows), planes=planes, across=seen)

    def nothing(self) -> Tensor:
        """Return 0 that depends on all of it, so that gradients, all zero, reach what made it."""
        parts = (self.tokens, *self.planes, *(() if self.across is None else (self.across,)))
        return 0.0 * torch.stack([part.sum() for part in parts]).sum()


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """How a batch's images fit its text, on the host.

    Args:
        arguments: of the image path's forward.
        counts: visual tokens of each image, in order; or
        grids: (t, h, w) of each image, for M-RoPE;
        time_intervals: of the grids' frames;
        media: start, stop (B, L) and the longest range, where layers look across; no token is spliced then.
    """

    arguments: Mapping[str, Any]
    counts: Sequence[int] | None = None
    grids: Sequence[Sequence[int]] | None = None
    time_intervals: Sequence[float] | None = None
    media: tuple[Tensor, Tensor, int] | None = None


class ImagePath(nn.Module):
    """Encoder, resolution strategy and connector of a family.

    Attributes:
        vision: the tower.
        width: of the tokens that come out.
        merge_size: patches of a grid on a side that make one visual token.
        across_width: of the tokens of another encoder that layers look at, where there is one.

    A path says what its tower sees of `arguments`, which `read` or `take` found (`units`, `part`, `encode`), and what
    becomes of the tower's rows (`connect`).
    """

    vision: Any
    width: int
    merge_size: int = 1
    across_width: int | None = None

    def forward(
        self, stored: Stored | None = None, store: FeatureStore | None = None, device: Any = None, **arguments: Any
    ) -> Visual:
        """Encode pictures and make visual tokens of them.

        Args:
            stored: pictures of the batch, of which `arguments` hold those that no store knew; None: they hold all.
            store: where features of the others are kept.
            device: of the features that were known.
            arguments: that `read` or `take` found; none where all pictures are known.
        """
        if stored is None:
            return self.connect(tower.encode(self, arguments), arguments)
        features = tower.encode_unknown(self, arguments or None, stored, store, device)
        return self.connect(features, stored.layout)

    def towers(self) -> Sequence[nn.Module]:
        """Return the modules that `encode` runs."""
        return (self.vision,)

    def units(self, arguments: Mapping[str, Any]) -> list[int]:
        """Return the patches of each unit, tile or picture, that the tower sees apart from others."""
        raise NotImplementedError

    def part(self, arguments: Mapping[str, Any], first: int, last: int) -> dict[str, Any]:
        """Return the arguments of units first .. last - 1."""
        raise NotImplementedError

    def encode(self, arguments: Mapping[str, Any]) -> Features:
        """Run the tower: packed rows, of each output as many a patch in every unit."""
        raise NotImplementedError

    def connect(self, features: Features, arguments: Mapping[str, Any]) -> Visual:
        """Make visual tokens of the tower's rows; `arguments` may be without pixels."""
        raise NotImplementedError

    def read(self, batch: Mapping[str, Any]) -> Seen | None:
        """Take the images out of what the family's processor in transformers made; None without images.

        Raises:
            ValueError: a part is missing or does not fit.
        """
        raise NotImplementedError

    def take(self, tiles: Sequence[tuple[Tensor, ...]], plans: Sequence[Plan]) -> Seen:
        """Take what a resolution policy made of images.

        Args:
            tiles: (n, H, W, 3) uint8 for each encoder, of each image.
            plans: of each image.

        Returns:
            The arguments, and the tokens or the grid of each image; without media.

        Raises:
            ValueError: this path has no such way, or the tiles are not its own.
        """
        raise ValueError(f"fastmllm::MLLM: {type(self).__name__} takes a processor's batch only: call inputs()")

    def blank(self) -> dict[str, Any]:
        """Return the arguments of `forward` for one small image of zeros, on the CPU."""
        raise NotImplementedError
