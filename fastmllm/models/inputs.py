"""What a multimodal model reads: packed text with placeholders, the plan of the spliced batch, and the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fastmllm.kernels._splice_plan import SplicePlan, splice_plan
from fastmllm.models.tower import Stored

IGNORE = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """A packed batch of S samples.

    Args:
        input_ids: (T,) int64 text with one placeholder an image, where visual tokens are spliced in.
        plan: rows, labels, positions and boundaries of the spliced batch (T' rows).
        images: arguments of the model's image path; None without images, or where all are in `stored`.
        media_start, media_stop: (T',) int32, the media tokens that each row sees, where layers look across; else None.
        max_media: media tokens of the longest such range, a host number.
        counts: visual tokens of each image in the text, on the host.
        grids: frames, rows and columns of them, where they are a grid (Qwen-VL), or None.
        ids: names of the samples.
        shown: rows of the image path's tokens, and of its other encoder's, that the batch's places show, where an image
            stands in several; None: each image stands in one.
        encoder_pixels: all that the encoders are given, and of that what shows something of a picture (`Plan`); (0, 0)
            where a processor made the batch.
        stored: images whose features a store keeps or already has; None without a store.
        budget: rows that it could have had, where it was filled to a budget; 0 = it has a number of samples.
    """

    input_ids: Tensor
    plan: SplicePlan
    images: Mapping[str, Any] | None = None
    media_start: Tensor | None = None
    media_stop: Tensor | None = None
    max_media: int = 0
    counts: tuple[int, ...] = ()
    grids: tuple[tuple[int, int, int], ...] | None = None
    ids: Sequence[str] = ()
    shown: tuple[Tensor, Tensor | None] | None = None
    encoder_pixels: tuple[int, int] = (0, 0)
    stored: Stored | None = None
    budget: int = 0

    @property
    def num_tokens(self) -> int:
        """T', rows of the spliced batch."""
        return self.plan.source.numel()

    @property
    def shows_images(self) -> bool:
        """Whether any row is, or sees, something of an image."""
        return self.images is not None or self.stored is not None

    @property
    def num_targets(self) -> int:
        """Rows with a label."""
        return self.plan.num_targets

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens in the text, and those beside it up to the last one that a row sees."""
        across = 0 if self.media_stop is None or not self.media_stop.numel() else int(self.media_stop.max())
        return sum(self.counts) + across

    @property
    def num_samples(self) -> int:
        """S."""
        return self.plan.cu_seqlens.numel() - 1

    @property
    def position_ids(self) -> Tensor:
        """(T',), or (3, T') for M-RoPE."""
        return self.plan.position_ids

    @property
    def cu_seqlens(self) -> Tensor:
        """(S + 1,) boundaries of the spliced batch."""
        return self.plan.cu_seqlens

    @property
    def max_seqlen(self) -> int:
        """The longest sample of the spliced batch."""
        return self.plan.max_seqlen

    def with_media(self, start: Tensor, stop: Tensor, longest: int) -> Inputs:
        """Return the batch with the media tokens that each row sees, (T',) int32 each."""
        return replace(self, media_start=start, media_stop=stop, max_media=longest)

    def to(self, device: torch.device | str) -> Inputs:
        """Return the batch with its tensors on a device."""
        moved: dict[str, Any] = {"plan": self.plan.to(device)}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device, non_blocking=True)
        if self.images is not None:
            moved["images"] = {
                k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in self.images.items()
            }
        if self.shown is not None:
            moved["shown"] = tuple(None if rows is None else rows.to(device) for rows in self.shown)
        return replace(self, **moved)


def unpad(
    input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
) -> tuple[list[list[int]], list[list[int]] | None]:
    """Drop the padding of a batch as processors of transformers make it.

    Args:
        input_ids: (B, L).
        attention_mask: (B, L), not 0 at tokens; None: nothing is padding.
        labels: (B, L) aligned with `input_ids`.

    Returns:
        The tokens of each sample, and their labels or None.

    Raises:
        ValueError: shapes differ, or padding lies between tokens.
    """
    if input_ids.dim() != 2 or any(t is not None and t.shape != input_ids.shape for t in (attention_mask, labels)):
        shapes = [None if t is None else tuple(t.shape) for t in (input_ids, attention_mask, labels)]
        raise ValueError(f"fastmllm::unpad: input_ids, attention_mask and labels {shapes} must all be (B, L)")
    keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    edges = keep.int().diff(dim=1, prepend=keep.new_zeros(len(keep), 1).int())
    if ((edges == 1).sum(1) > 1).any():
        row = int(((edges == 1).sum(1) > 1).nonzero()[0])
        raise ValueError(f"fastmllm::unpad: attention_mask of sample {row} has padding between its tokens")
    tokens = [row[mask].tolist() for row, mask in zip(input_ids, keep, strict=True)]
    if labels is None:
        return tokens, None
    return tokens, [row[mask].tolist() for row, mask in zip(labels, keep, strict=True)]


def make_inputs(
    samples: Sequence[Sequence[int]],
    *,
    placeholders: Sequence[int] = (),
    counts: Sequence[int] | None = None,
    grids: Sequence[Sequence[int]] | None = None,
    labels: Sequence[Sequence[int]] | None = None,
    images: Mapping[str, Any] | None = None,
    spatial_merge_size: int = 2,
    time_intervals: Sequence[float] | None = None,
    expanded: bool = False,
) -> Inputs:
    """Pack samples whose images are marked by placeholders.

    Args:
        samples: tokens of each sample.
        placeholders: tokens that stand for images; none where images stay beside the text.
        counts: visual tokens of each image, in the order of their places in the batch.
        grids: (t, h, w) of each image instead: positions are M-RoPE's.
        labels: aligned with `samples`; -100 where a token is not scored. They are shifted here.
        images: arguments of the model's image path.
        spatial_merge_size: of the grids.
        time_intervals: of the grids, as in `splice_plan`.
        expanded: an image is marked by as many placeholders as it has visual tokens, as processors of transformers
            write them, instead of by one.

    Returns:
        The packed batch, on the CPU.

    Raises:
        ValueError: placeholders do not fit the images, or those of one do not stand side by side; the message names
            the sample.
    """
    num = list(counts or ()) if grids is None else [t * h * w // spatial_merge_size**2 for t, h, w in grids]
    text: list[int] = []
    targets: list[int] = []
    bounds, owned, first = [0], [], 0
    for place, sample in enumerate(samples):
        marked = [k for k, token in enumerate(sample) if token in placeholders]
        groups = _groups(marked, num[first:], f"sample {place}") if expanded else [[k] for k in marked]
        repeated = {k for group in groups for k in group[1:]}
        kept = [k for k in range(len(sample)) if k not in repeated]
        text += [sample[k] for k in kept]
        if labels is not None:
            targets += [labels[place][k] for k in kept]
        bounds.append(len(text))
        owned.append((first, first + len(groups)))
        first += len(groups)
    if first != len(num):
        raise ValueError(f"fastmllm::make_inputs: {len(num)} images are given, but the text has places for {first}")
    ids = torch.tensor(text, dtype=torch.int64)
    plan = splice_plan(
        ids,
        bounds,
        None if grids is not None else [num[a:b] for a, b in owned],
        placeholder=tuple(placeholders),
        grid_thw=None if grids is None else [list(grids[a:b]) for a, b in owned],
        spatial_merge_size=spatial_merge_size,
        time_intervals=None if time_intervals is None else [list(time_intervals[a:b]) for a, b in owned],
        labels=targets if labels is not None else None,
        shift_labels=True,
    )
    names = tuple(f"sample {k}" for k in range(len(samples)))
    m = spatial_merge_size
    merged = None if grids is None else tuple((t, h // m, w // m) for t, h, w in grids)
    return Inputs(input_ids=ids, plan=plan, images=images, counts=tuple(num), grids=merged, ids=names)


def _groups(marked: list[int], counts: Sequence[int], name: str) -> list[list[int]]:
    """Part the repeated placeholders of a sample by image; those of one image stand side by side."""
    groups, start = [], 0
    for count in counts:
        if start == len(marked):
            break
        groups.append(marked[start : start + count])
        start += count
    if start != len(marked):
        raise ValueError(
            f"fastmllm::make_inputs: {name} has {len(marked)} image placeholders, but its next images have "
            f"{list(counts[: len(groups) + 1])} visual tokens"
        )
    for image, group in enumerate(groups):
        together = next((n for n, at in enumerate(group) if at != group[0] + n), len(group))
        if together != len(group):
            raise ValueError(
                f"fastmllm::make_inputs: {name}: image {image} has {len(group)} visual tokens, but only {together} "
                f"placeholders side by side at token {group[0]}, the next at {group[together]}"
            )
    return groups
