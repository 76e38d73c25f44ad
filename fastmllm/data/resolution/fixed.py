"""One square for every image: CLIP, SigLIP, LLaVA-1.5, BLIP-2, Flamingo."""

from __future__ import annotations

from dataclasses import dataclass

from fastmllm.data.resolution.plan import Place, Plan, Policy, Resize, Tile, View

FITS = ("resize", "crop", "pad")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed(Policy):
    """Resize each image to one square.

    Args:
        image_size: side in pixels.
        patch_size: of the encoder, pixels.
        fit: "resize" stretches (SigLIP), "crop" resizes the shorter side and cuts the middle out (CLIP), "pad" lays the
            image on a square of its longer side first (LLaVA-1.5).
        fill: colour of that square; LLaVA takes the encoder's mean.
        shuffle: side of the block of patches that becomes one token.
        queries: tokens that a resampler makes of the image instead; None = no resampler.
        cross: the language model reads them by cross-attention (Flamingo).
        prefix_tokens: rows of the encoder beside the patches (CLIP's class token).
        newline: a newline token behind the image (LLaVA-OneVision with several images).

    Equal to `CLIPImageProcessor`, `SiglipImageProcessor` and `LlavaImageProcessor` (do_pad) of transformers.
    """

    image_size: int = 336
    patch_size: int = 14
    fit: str = "crop"
    fill: tuple[int, int, int] = (122, 116, 104)  # int(255 x CLIP's mean)
    shuffle: int = 1
    queries: int | None = None
    cross: bool = False
    prefix_tokens: int = 0
    newline: bool = False

    def __post_init__(self) -> None:
        Policy.__post_init__(self)
        if self.fit not in FITS:
            raise ValueError(f"Fixed: fit {self.fit!r} must be one of {FITS}")
        self._check_tokens("image_size", "patch_size", "shuffle")
        self._check("prefix_tokens", least=0)
        if self.queries is not None and self.queries < 1:
            raise ValueError(f"Fixed: queries must be at least 1, got {self.queries}")

    def _plan(self, width: int, height: int) -> Plan:
        side = self.image_size // self.patch_size
        tokens = (side // self.shuffle) ** 2 if self.queries is None else self.queries
        tokens += int(self.newline)
        inside = 0 if self.cross else tokens
        return Plan(
            size=(width, height),
            views=(self._view(width, height),),
            tiles=(Tile(view=0, box=(0, 0, self.image_size, self.image_size)),),
            grid=(1, 1),
            vit_tokens=side**2 + self.prefix_tokens,
            llm_tokens=inside,
            cross_tokens=tokens - inside,
            text=(inside,) if inside else (),
        )

    def _view(self, width: int, height: int) -> View:
        size = self.image_size
        square = Resize(size, size)
        if self.fit == "resize":
            return (square,)
        if self.fit == "pad":
            longer = max(width, height)
            return (Place(longer, longer, (longer - width) // 2, (longer - height) // 2, self.fill), square)
        longer = int(size * max(width, height) / min(width, height))
        shrunk = Resize(size, longer) if width <= height else Resize(longer, size)
        return (shrunk, Place(size, size, -((shrunk.width - size) // 2), -((shrunk.height - size) // 2)))
