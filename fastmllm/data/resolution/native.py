"""Native resolution: each image keeps its size but for rounding to whole blocks of patches (Qwen2-VL to Qwen3-VL)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastmllm.data.resolution.plan import Pixels, Plan, Policy, Resize, Tile, join_text, to_image

MAX_RATIO = 200
BUDGETS = ("frame", "video")


@dataclass(frozen=True, kw_only=True, slots=True)
class Native(Policy):
    """Round both sides to blocks of merge_size x merge_size patches, within a budget of pixels.

    Args:
        patch_size: of the encoder, pixels.
        merge_size: side of the block of patches that becomes one token.
        temporal_patch_size: frames of a patch; an image stands for as many equal frames.
        min_pixels, max_pixels: of an image; None = no limit.
        video_min_pixels, video_max_pixels: of a video, by `video_budget`.
        video_budget: "frame" counts each frame (Qwen2-VL, Qwen2.5-VL), "video" all frames together (Qwen3-VL), which
            also puts the time in front of each frame of the text.
        start, end: text around the image.

    Qwen3-VL: `Native(patch_size=16, min_pixels=65536, max_pixels=16777216, video_min_pixels=4096,
    video_max_pixels=25165824, video_budget="video")`, as its checkpoints' preprocessors say.

    Equal to `Qwen2VLImageProcessor` and to the two `smart_resize` of transformers' video processors, without their
    optional cap (`cap_pixels_per_frame`), which is a smaller `video_max_pixels`.
    """

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int | None = 56 * 56
    max_pixels: int | None = 28 * 28 * 1280
    video_min_pixels: int | None = 128 * 28 * 28
    video_max_pixels: int | None = 28 * 28 * 768
    video_budget: str = "frame"
    start: str = "<|vision_start|>"
    end: str = "<|vision_end|>"

    def __post_init__(self) -> None:
        Policy.__post_init__(self)
        self._check("patch_size", "merge_size", "temporal_patch_size")
        if self.video_budget not in BUDGETS:
            raise ValueError(f"Native: video_budget {self.video_budget!r} must be one of {BUDGETS}")
        for low, high in (("min_pixels", "max_pixels"), ("video_min_pixels", "video_max_pixels")):
            least, most = getattr(self, low) or 0, getattr(self, high)
            if least < 0 or (most is not None and most < max(least, 1)):
                raise ValueError(f"Native: {low} {least} and {high} {most} leave no size")

    def _plan(self, width: int, height: int) -> Plan:
        resized = smart_resize(width, height, self._block, self.min_pixels, self.max_pixels)
        return self._packed(width, height, resized, 1)

    def plan_video(self, width: int, height: int, frames: int, seconds: Sequence[float] | None = None) -> Plan:
        """Plan a video.

        Args:
            width, height: of each frame, pixels.
            frames: how many; the last one is repeated up to a multiple of `temporal_patch_size`.
            seconds: of each frame, for the text of Qwen3-VL; None = without times.

        Raises:
            ValueError: no frames, sizes that are refused, or times of another number of frames.
        """
        if frames < 1 or (seconds is not None and len(seconds) != frames):
            raise ValueError(f"Native: {frames} frames with {None if seconds is None else len(seconds)} times")
        whole = self.video_budget == "video"
        if whole and frames < self.temporal_patch_size:
            raise ValueError(f"Native: {frames} frames do not fill a patch of {self.temporal_patch_size}")
        if width < 1 or height < 1:
            raise ValueError(f"Native: a video of {width} x {height} pixels; both must be at least 1")
        limits = self.video_min_pixels, self.video_max_pixels
        size = width, height
        if not whole:
            return self._packed(width, height, smart_resize(*size, self._block, *limits), frames)
        if min(size) < self._block:
            scale = self._block / min(size)
            size = int(width * scale), int(height * scale)
        resized = smart_resize(*size, self._block, *limits, frames, self.temporal_patch_size)
        plan = self._packed(width, height, resized, frames)
        return plan if seconds is None else replace(plan, text=self._timed(plan.llm_tokens, seconds))

    def _timed(self, num_tokens: int, seconds: Sequence[float]) -> tuple[str | int, ...]:
        """Return the text of a video: each patch of frames behind the mean of its first and its last frame's time."""
        step = self.temporal_patch_size
        times = [*seconds, *[seconds[-1]] * (-len(seconds) % step)]
        middles = [(first + last) / 2 for first, last in zip(times[::step], times[step - 1 :: step], strict=True)]
        tokens = num_tokens // len(middles)
        return join_text(p for t in middles for p in (f"<{t:.1f} seconds>{self.start}", tokens, self.end))

    def apply_video(self, frames: Sequence[Pixels], plan: Plan | None = None) -> tuple[Tensor]:
        """Return a video's frames, resized, the last one repeated to whole patches: one (F, H, W, 3) uint8.

        Args:
            frames: images of one size.
            plan: of this video, where it is already there.

        Raises:
            ValueError: no frames, frames of several sizes, or the plan is for another video.
        """
        images = [to_image(frame) for frame in frames]
        sizes = {image.size for image in images}
        if len(sizes) != 1:
            raise ValueError(f"Native: the frames of a video must have one size, got {sorted(sizes)}")
        plan = self.plan_video(*images[0].size, len(images)) if plan is None else plan
        if plan.frames != len(images):
            raise ValueError(f"Native: a plan for {plan.frames} frames does not fit {len(images)}")
        pixels = [Policy.apply(self, image, plan)[0] for image in images]
        pixels += [pixels[-1]] * (-len(images) % self.temporal_patch_size)
        return (torch.cat(pixels),)

    @property
    def _block(self) -> int:
        return self.patch_size * self.merge_size

    def _packed(self, width: int, height: int, resized: tuple[int, int], frames: int) -> Plan:
        across, down = resized
        times = math.ceil(frames / self.temporal_patch_size)
        grid = (times, down // self.patch_size, across // self.patch_size)
        patches = grid[0] * grid[1] * grid[2]
        tokens = patches // self.merge_size**2
        return Plan(
            size=(width, height),
            views=((Resize(across, down),),),
            tiles=(Tile(view=0, box=(0, 0, across, down)),),
            grid=(1, 1),
            vit_tokens=patches,
            llm_tokens=tokens,
            text=(self.start, tokens, self.end),
            grid_thw=grid,
            frames=frames,
        )


def smart_resize(
    width: int, height: int, block: int, least: int | None, most: int | None, frames: int = 1, temporal: int = 1
) -> tuple[int, int]:
    """Return (width, height) in multiples of `block`, within the pixels of `frames` frames together.

    Args:
        width, height: pixels; their ratio is at most 200.
        block: pixels.
        least, most: pixels of all frames; None = no limit.
        frames, temporal: frames, and those of a patch: counted rounded to whole patches.

    Raises:
        ValueError: the aspect ratio is above 200.
    """
    ratio = max(width, height) / min(width, height)
    if ratio > MAX_RATIO:
        raise ValueError(f"Native: the aspect ratio of {width} x {height} is {ratio:g}, more than {MAX_RATIO}: crop it")
    across, down = round(width / block) * block, round(height / block) * block
    times = round(frames / temporal) * temporal
    if most is not None and times * across * down > most:
        beta = math.sqrt((frames * width * height) / most)
        across = max(block, math.floor(width / beta / block) * block)
        down = max(block, math.floor(height / beta / block) * block)
    elif times * across * down < (least or 1):
        beta = math.sqrt((least or block * block) / (frames * width * height))
        across, down = math.ceil(width * beta / block) * block, math.ceil(height * beta / block) * block
    return across, down
