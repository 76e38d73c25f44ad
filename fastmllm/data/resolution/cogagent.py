"""CogAgent's two encoders: a small image in the sequence, a large one in cross-attention."""

from __future__ import annotations

from dataclasses import dataclass

from fastmllm.data.resolution.plan import Plan, Policy, Resize, Tile


@dataclass(frozen=True, kw_only=True, slots=True)
class CogAgent(Policy):
    """Stretch each image to two squares.

    Args:
        image_size: side for the encoder whose tokens stand in the sequence (encoder 0), pixels.
        cross_image_size: side for the encoder that every layer reads by cross-attention (encoder 1), pixels.
        patch_size: of both encoders, pixels.
        border_tokens: learned rows around the visual tokens (begin and end of image); they are no text.
        prefix_tokens: rows of each encoder beside the patches.

    Equal to CogAgent-18B (arXiv 2312.08914): 256 tokens and 2 border rows in the sequence, 6,400 beside it.
    """

    image_size: int = 224
    cross_image_size: int = 1120
    patch_size: int = 14
    border_tokens: int = 2
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        Policy.__post_init__(self)
        self._check_tokens("image_size", "patch_size")
        self._check_tokens("cross_image_size", "patch_size")
        self._check("border_tokens", "prefix_tokens", least=0)

    def _plan(self, width: int, height: int) -> Plan:
        low, high = self.image_size, self.cross_image_size
        inside, cross = (low // self.patch_size) ** 2, (high // self.patch_size) ** 2
        return Plan(
            size=(width, height),
            views=((Resize(high, high),), (Resize(low, low),)),
            tiles=(Tile(view=1, box=(0, 0, low, low)), Tile(view=0, box=(0, 0, high, high), encoder=1)),
            grid=(1, 1),
            vit_tokens=inside + cross + 2 * self.prefix_tokens,
            llm_tokens=inside + self.border_tokens,
            cross_tokens=cross,
            text=(inside + self.border_tokens,),
        )
