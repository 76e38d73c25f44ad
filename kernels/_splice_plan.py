"""Plan where text and visual tokens go in a spliced batch: rows, labels, positions, boundaries; on the host.

Shapes: S samples, T rows of text with one placeholder an image, I images, V visual tokens, T' = T - I + V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._runs import to_device

IGNORE = -100
Grid = Sequence[int]  # t, h, w: patches


@dataclass(frozen=True, kw_only=True, slots=True)
class SplicePlan:
    """Where rows go, and what the spliced batch looks like.

    Args:
        source: (T',) int64 row of cat(text, visual) that each output row takes.
        text_rows: (T,) int64 output row of each text row; -1 for placeholders.
        visual_rows: (V,) int64 output row of each visual token.
        input_ids: (T',) int64, placeholders repeated.
        labels: (T',) int64, -100 at visual tokens; None without labels.
        position_ids: (T',) int64 restarting in each sample; (3, T') time, height, width with grids (M-RoPE).
        cu_seqlens: (S + 1,) int32.
        rope_deltas: (S,) int64, next position minus length: where generation goes on.
        max_seqlen: longest sample, a host number.
        num_targets: labels that are not -100, a host number.
        visual_ends: for each sample its name, and the visual tokens up to its end.
    """

    source: Tensor
    text_rows: Tensor
    visual_rows: Tensor
    input_ids: Tensor
    labels: Tensor | None
    position_ids: Tensor
    cu_seqlens: Tensor
    rope_deltas: Tensor
    max_seqlen: int
    num_targets: int
    visual_ends: tuple[tuple[str, int], ...]

    def to(self, device: torch.device | str) -> SplicePlan:
        """Return the plan with its tensors on a device; the host does not wait for it."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = to_device(value, device)
        return replace(self, **moved)


def splice_plan(
    input_ids: Any,
    cu_seqlens: Any,
    counts: Sequence[Sequence[int]] | None = None,
    *,
    placeholder: int | Sequence[int],
    grid_thw: Sequence[Sequence[Grid]] | None = None,
    spatial_merge_size: int = 2,
    time_intervals: Sequence[Sequence[float]] | None = None,
    labels: Any = None,
    shift_labels: bool = False,
    ids: Sequence[str] | None = None,
) -> SplicePlan:
    """Plan a spliced batch. Images are listed sample by sample, in the order of their placeholders.

    Args:
        input_ids: (T,) integers, one placeholder an image or video: list, array or CPU tensor, as all that follow.
        cu_seqlens: (S + 1,) boundaries of the samples in `input_ids`.
        counts: for each sample the visual tokens of each of its images; grids make them unnecessary.
        placeholder: the token that stands for an image, or several such tokens (image, video).
        grid_thw: for each sample the (t, h, w) patches of each image: then positions are M-RoPE's.
        spatial_merge_size: patches on a side that make one visual token of a grid.
        time_intervals: for each sample the positions between two frames of each of its grids (Qwen2.5-VL's videos:
            tokens_per_second times seconds a frame); None is 1 for all.
        labels: (T,) aligned with `input_ids`; -100 where a token is not scored.
        shift_labels: let labels[t] be the token after t of the same sample, as `linear_cross_entropy` wants them.
        ids: S names for errors.

    Returns:
        The plan, on the CPU.

    Raises:
        ValueError: placeholders, counts and grids do not fit together (the sample is named), or shapes do not.

    Positions equal `get_rope_index` of Qwen2-VL and Qwen2.5-VL: each part starts behind the largest position so far
    (arXiv 2409.12191). transformers 5 looks only at height and width there (huggingface/transformers#45381), so that
    text behind a video that is longer in time than in space starts earlier.
    """
    tokens, bounds = _host(input_ids, "input_ids"), _host(cu_seqlens, "cu_seqlens")
    if not bounds.size or bounds[0] != 0 or bounds[-1] != tokens.size or (np.diff(bounds) < 0).any():
        raise ValueError(f"fastmllm::splice_tokens: cu_seqlens {bounds.tolist()[:8]} must rise from 0 to the length of "
                         f"input_ids ({tokens.size},)")  # fmt: skip
    targets = None if labels is None else _host(labels, "labels")
    if targets is not None and targets.shape != tokens.shape:
        raise ValueError(f"fastmllm::splice_tokens: labels {targets.shape} and input_ids {tokens.shape} differ")
    num_samples = bounds.size - 1
    if ids is not None and len(ids) != num_samples:
        raise ValueError(f"fastmllm::splice_tokens: {len(ids)} ids for {num_samples} samples")
    names = [f"sample {s}" if ids is None else f"sample {s} ({ids[s]!r})" for s in range(num_samples)]
    is_visual = np.isin(tokens, placeholder)
    images = np.flatnonzero(is_visual)  # (I,)
    image_bounds = np.searchsorted(images, bounds)
    _check_images(names, np.diff(image_bounds), counts=counts, grid_thw=grid_thw, time_intervals=time_intervals)
    grids = None if grid_thw is None else np.array([g for s in grid_thw for g in s], np.int64).reshape(-1, 3)
    flat = _visual_counts(names, image_bounds, counts, grids, spatial_merge_size)

    repeats = np.ones(tokens.size, np.int64)
    repeats[images] = flat
    ends = np.concatenate([[0], np.cumsum(repeats)])
    text_of = np.repeat(np.arange(tokens.size), repeats)  # (T',)
    text_rows = np.where(is_visual, -1, ends[:-1])
    is_visual = is_visual[text_of]
    visual_rows = np.flatnonzero(is_visual)
    source = text_of.copy()
    source[visual_rows] = tokens.size + np.arange(visual_rows.size)
    starts = ends[bounds]
    lengths = np.diff(starts)

    if grids is None:
        positions = np.arange(source.size) - np.repeat(starts[:-1], lengths)
        deltas = np.zeros(num_samples, np.int64)
    else:
        intervals = np.ones(images.size) if time_intervals is None else np.array([x for s in time_intervals for x in s])
        within = _grid_positions(grids, flat, spatial_merge_size, intervals)  # (3, V)
        step = np.ones(tokens.size, np.int64)  # what a text row adds to the position
        if images.size:
            step[images] = np.maximum.reduceat(within.max(0), np.cumsum(flat) - flat) + 1
        reached = np.concatenate([[0], np.cumsum(step)])
        positions = np.tile((reached[:-1] - np.repeat(reached[bounds[:-1]], np.diff(bounds)))[text_of], (3, 1))
        positions[:, visual_rows] += within
        deltas = np.diff(reached[bounds]) - lengths

    if targets is not None:
        targets = np.where(is_visual, IGNORE, targets[text_of])
        if shift_labels and targets.size:
            targets = np.append(targets[1:], IGNORE)
            targets[starts[1:][lengths > 0] - 1] = IGNORE
    visual_ends = np.concatenate([[0], np.cumsum(flat)])[image_bounds[1:]]
    return SplicePlan(
        source=torch.from_numpy(source),
        text_rows=torch.from_numpy(text_rows),
        visual_rows=torch.from_numpy(visual_rows),
        input_ids=torch.from_numpy(tokens[text_of]),
        labels=None if targets is None else torch.from_numpy(targets),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        rope_deltas=torch.from_numpy(deltas),
        max_seqlen=int(lengths.max(initial=0)),
        num_targets=0 if targets is None else int((targets != IGNORE).sum()),
        visual_ends=tuple(zip(names, visual_ends.tolist(), strict=True)),
    )


def _host(values: Any, what: str) -> np.ndarray:
    if isinstance(values, Tensor) and values.device.type != "cpu":
        raise ValueError(f"fastmllm::splice_tokens: {what} {tuple(values.shape)} is on {values.device}: plan on the "
                         "host, before the batch moves")  # fmt: skip
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"fastmllm::splice_tokens: {what} {array.shape} {array.dtype} must be a row of integers")
    return array.astype(np.int64)


def _check_images(names: list[str], placeholders: np.ndarray, **given: Sequence[Sequence[Any]] | None) -> None:
    """Compare the images that are described with the placeholders of each sample."""
    if given["counts"] is None and given["grid_thw"] is None:
        raise ValueError("fastmllm::splice_tokens: give counts or grid_thw")
    if given["time_intervals"] is not None and given["grid_thw"] is None:
        raise ValueError("fastmllm::splice_tokens: time_intervals need grid_thw")
    for what, nested in given.items():
        if nested is None:
            continue
        if len(nested) != len(names):
            raise ValueError(f"fastmllm::splice_tokens: {what} describes {len(nested)} samples, but cu_seqlens "
                             f"{len(names)}")  # fmt: skip
        for name, images, expected in zip(names, nested, placeholders.tolist(), strict=True):
            if len(images) != expected:
                raise ValueError(f"fastmllm::splice_tokens: {name} has {expected} image placeholders, but {what} "
                                 f"describes {len(images)} images")  # fmt: skip


def _visual_counts(
    names: list[str],
    image_bounds: np.ndarray,
    counts: Sequence[Sequence[int]] | None,
    grids: np.ndarray | None,
    merge: int,
) -> np.ndarray:
    """Return the visual tokens of each image (I,), given, or made by its grid; where both are known they must agree."""

    flat = None if counts is None else np.array([n for sample in counts for n in sample], np.int64)
    made = flat if grids is None else grids.prod(1) // merge**2
    assert made is not None

    def complain(wrong: np.ndarray, text: str) -> None:
        if wrong.any():
            i = int(wrong.argmax())
            s = int(np.searchsorted(image_bounds, i, side="right")) - 1
            facts = {"count": None if flat is None else flat[i], "merge": merge, "made": made[i]}
            facts["grid"] = None if grids is None else tuple(grids[i].tolist())
            raise ValueError(
                f"fastmllm::splice_tokens: {names[s]}, image {i - image_bounds[s]}: {text.format(**facts)}"
            )

    if flat is not None:
        complain(flat < 0, "{count} visual tokens")
    if grids is None:
        return made
    fits = (grids >= 1).all(1) & (grids[:, 1:] % merge == 0).all(1)
    complain(~fits, "the grid {grid} must be positive, height and width multiples of spatial_merge_size {merge}")
    if flat is not None:
        complain(np.not_equal(flat, made),
                 "{count} visual tokens, but the grid {grid} with spatial_merge_size {merge} makes {made}")  # fmt: skip
    return made


def _grid_positions(grids: np.ndarray, counts: np.ndarray, merge: int, intervals: np.ndarray) -> np.ndarray:
    """Return (3, V): time, height and width of each visual token within its image."""
    height, width = (np.repeat(grids[:, axis] // merge, counts) for axis in (1, 2))
    local = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    frames = local // (height * width)
    time = frames.astype(np.float32) * np.repeat(intervals.astype(np.float32), counts)  # cut to integers, as published
    return np.stack([time.astype(np.int64), local // width % height, local % width])
