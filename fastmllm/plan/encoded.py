"""Visual tokens without pictures: what stands in for an image path where only their number matters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from fastmllm.data.resolution import Plan, Policy
from fastmllm.models.image_path import ImagePath, Seen, Visual
from fastmllm.models.inputs import Inputs
from fastmllm.models.mllm import MLLM
from fastmllm.models.packing import Packing


def blank_tiles(plan: Plan) -> tuple[Tensor, ...]:
    """Return a plan's tiles, as a policy's `apply` does, without pixels: (n, H, W, 3) uint8 for each encoder."""
    tiles = []
    for encoder in range(max(tile.encoder for tile in plan.tiles) + 1):
        boxes = [tile.box for tile in plan.tiles if tile.encoder == encoder]
        left, top, right, bottom = boxes[0]
        tiles.append(torch.empty(len(boxes), bottom - top, right - left, 3, dtype=torch.uint8, device="meta"))
    return tuple(tiles)


class _Runs:
    """A policy to which every picture is one run of tokens, with nothing to cut."""

    def __init__(self, found: Plan) -> None:
        self.found = found

    def plan(self, width: int, height: int) -> Plan:
        return self.found

    def apply(self, image: Any, plan: Plan) -> tuple[Tensor, ...]:
        return ()


class Encoded(ImagePath):
    """Give as many visual tokens as a plan says.

    Args:
        path: that it stands in for.
        rows: tokens of each picture of a sample, in the text or across.
        beside: tokens of the other encoder, of each picture.
        planes: further features of each token.
    """

    def __init__(self, path: ImagePath, rows: Sequence[int], beside: int, planes: int) -> None:
        super().__init__()
        self.width, self.across_width = path.width, path.across_width
        self.rows, self.beside, self.planes = tuple(rows), beside, planes

    def take(self, tiles: Sequence[tuple[Tensor, ...]], plans: Sequence[Plan]) -> Seen:
        """Take any pictures."""
        counts = [self.rows[number % len(self.rows)] for number in range(len(plans))]
        return Seen(arguments={"tokens": sum(counts), "pictures": len(plans)}, counts=counts)

    def forward(self, *stored: Any, **arguments: Any) -> Visual:
        """Return them; what is stored of pictures does not matter."""

        def make(rows: int, width: int) -> Tensor:
            return torch.empty(rows, width, dtype=torch.bfloat16, device="meta")

        tokens, pictures = arguments["tokens"], arguments["pictures"]
        across = None if self.across_width is None else make(pictures * self.beside, self.across_width)
        planes = tuple(make(tokens, self.width) for _ in range(self.planes))
        return Visual(tokens=make(tokens, self.width), planes=planes, across=across)


@contextmanager
def encoded(
    model: MLLM, plan: Plan, rows: Sequence[int], beside: int, *, samples: int, images: int, text: int
) -> Iterator[Inputs]:  # fmt: skip
    """Let a model stand for one whose pictures are encoded, and pack a batch for it.

    Args:
        model: on the meta device.
        plan: of every picture.
        rows: visual tokens of a picture, in the runs that are compressed for themselves.
        beside: tokens of another encoder that layers look at.
        samples, images, text: of the batch, of a sample, and tokens of a sample.
    """
    path, packing = model.images, model.packing
    assert packing is not None
    planes = len(getattr(getattr(path, "vision", None), "deepstack", ()) or ())
    model.images = Encoded(path, rows, beside, planes)
    model.packing = Packing(policy=cast(Policy, _Runs(plan)), image_token=packing.image_token)
    try:
        pictures = len(rows) * images
        blank = [[torch.empty(1, 1, 3, dtype=torch.uint8) for _ in range(pictures)] for _ in range(samples)]
        yield model.pack([[*row, *[0] * text] for row in blank])
    finally:
        model.images, model.packing = path, packing
