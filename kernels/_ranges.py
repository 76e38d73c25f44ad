"""Which keys each row of cross_attention sees: as ranges, from segments, from interleaved images, from a tile mask."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_ranges(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return the ranges with which the queries of each segment see all keys of that segment.

    Args:
        cu_seqlens_q: (S + 1,) int32 boundaries of the segments in the query rows.
        cu_seqlens_k: (S + 1,) int32 boundaries of the segments in the packed keys.
        num_rows: query rows (T), which the host knows, so that it need not wait for the device.

    Returns:
        media_start and media_stop, (T,) int32; rows behind the last segment get an empty range.

    Raises:
        ValueError: a tensor has another shape, or the two bound different numbers of segments.

    The cross-attention of Q-Former (BLIP-2, arXiv 2301.12597) and of the Perceiver resampler.
    """
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape != cu_seqlens_k.shape or not cu_seqlens_q.numel():
        raise ValueError(f"fastmllm::segment_ranges: cu_seqlens_q {tuple(cu_seqlens_q.shape)} and cu_seqlens_k "
                         f"{tuple(cu_seqlens_k.shape)} must both be (S + 1,)")  # fmt: skip
    segment = _segment_of(cu_seqlens_q, num_rows)
    bounds = torch.cat([cu_seqlens_k, cu_seqlens_k[-1:]]).to(torch.int32)
    return bounds[segment], bounds[segment + 1]


def _segment_of(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """Return the segment of each row; S for rows behind the last one."""
    rows = torch.arange(num_rows, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long(), rows, right=True)


def media_ranges(
    is_media: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    policy: str = "latest",
    empty: str = "zeros",
    tiles: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return which keys each text row of a packed batch sees; the host does not wait for the device.

    Args:
        is_media: (T,) bool, true on the one row of each image (its placeholder token); that row sees its image too.
        cu_seqlens_q: (S + 1,) int32 boundaries of the samples in the T rows.
        cu_seqlens_k: (I + 1,) int32 boundaries of the images in the packed keys, in the order of their rows; with
            `tiles`, (sum of tiles + 1,) boundaries of the tiles.
        policy: "latest", only the image last introduced in the same sample (Flamingo's text_time == media_time);
            "latest_group", the last run of images whose rows are neighbours (the processor of Llama-3.2-Vision);
            "all_previous", every image introduced in the sample so far (>=).
        empty: what rows before the first image of their sample see. "zeros", nothing: cross_attention gives zeros
            (OpenFlamingo, Idefics, Meta's Llama-3.2-Vision); "all", every image of their sample, later ones too
            (transformers' Mllama, which clears the mask of such a row; a sample without images sees nothing).
        tiles: (I,) int32, how many neighbouring tiles an image has, or None where `cu_seqlens_k` bounds images.

    Returns:
        media_start and media_stop, (T,) int32.

    Raises:
        ValueError: a policy is unknown, a tensor has another shape or dtype, or (on a CPU, where the check is free)
            the marked rows are not as many as the images.

    The masks of OpenFlamingo's `only_attend_immediate_media` and of Llama-3.2-Vision without padding tiles, as ranges.
    """
    if policy not in ("latest", "latest_group", "all_previous"):
        raise ValueError(
            f'fastmllm::media_ranges: policy {policy!r} must be "latest", "latest_group" or "all_previous"'
        )
    _check_empty("media_ranges", empty)
    if is_media.dim() != 1 or is_media.dtype != torch.bool or cu_seqlens_q.dim() != 1 or cu_seqlens_k.dim() != 1:
        raise ValueError(
            f"fastmllm::media_ranges: is_media {tuple(is_media.shape)} {is_media.dtype}, cu_seqlens_q "
            f"{tuple(cu_seqlens_q.shape)} and cu_seqlens_k {tuple(cu_seqlens_k.shape)} must be (T,) bool, (S + 1,) "
            "and (I + 1,)"
        )
    if tiles is not None:
        ends = torch.cat([tiles.new_zeros(1), tiles.cumsum(0)]).long()  # (I + 1,) the first tile of each image
        if tiles.is_cpu and not torch.compiler.is_compiling() and int(ends[-1]) != cu_seqlens_k.numel() - 1:
            raise ValueError(f"fastmllm::media_ranges: tiles {tuple(tiles.shape)} sum to {int(ends[-1])}, but "
                             f"cu_seqlens_k {tuple(cu_seqlens_k.shape)} bounds {cu_seqlens_k.numel() - 1}")  # fmt: skip
        cu_seqlens_k = cu_seqlens_k[ends]
    num_media = cu_seqlens_k.numel() - 1
    if is_media.is_cpu and not torch.compiler.is_compiling() and int(is_media.sum()) != num_media:
        raise ValueError(f"fastmllm::media_ranges: is_media {tuple(is_media.shape)} marks {int(is_media.sum())} rows, "
                         f"but cu_seqlens_k {tuple(cu_seqlens_k.shape)} bounds {num_media} images")  # fmt: skip
    seen = is_media.cumsum(0)  # (T,) images introduced up to and including a row, in all samples
    before = torch.cat([seen.new_zeros(1), seen])  # (T + 1,) ... before a row
    sample = _segment_of(cu_seqlens_q, is_media.numel())
    ends = before[cu_seqlens_q.long()]  # (S + 1,) the first image of each sample
    ends = torch.cat([ends, ends[-1:]])  # rows behind the last sample are in one of no images
    first = ends[sample]  # (T,) the first image of a row's sample
    if policy == "latest":
        oldest = seen - 1
    elif policy == "all_previous":
        oldest = first
    else:
        follows = torch.cat([is_media.new_zeros(1), is_media[:-1] & (sample[1:] == sample[:-1])])[: is_media.numel()]
        oldest = torch.where(is_media & ~follows, seen - 1, 0).cummax(0).values if is_media.numel() else seen
    none = seen == first
    newest = torch.where(none, ends[sample + 1], seen) if empty == "all" else seen
    oldest = torch.where(none, first, oldest)
    bounds = cu_seqlens_k.to(torch.int32)
    start, stop = (bounds[t.clamp(min=0, max=num_media)] for t in (oldest, newest))
    return start, stop


def mask_ranges(mask: Tensor, tile_tokens: int, empty: str = "zeros") -> tuple[Tensor, Tensor]:
    """Return the ranges of a tile mask over padded media; the host does not wait for the device.

    Args:
        mask: (B, T, I, tiles), not 0 where a row sees a tile: `cross_attention_mask` of Llama-3.2-Vision.
        tile_tokens: tokens of a tile (1601 at 560 pixels).
        empty: what rows see whose mask is 0 throughout. "zeros", nothing, as in Meta's code; "all", every key of their
            sample, padding included, as in transformers' Mllama.

    Returns:
        media_start and media_stop, (B * T,) int32, counted in B * I * tiles * tile_tokens keys.

    Raises:
        ValueError: the shape or the policy does not fit, or (on a CPU, where the check is free) the tiles that a row
            sees are not neighbours: then pack the media without padding tiles and use `media_ranges`.

    Equal to transformers' `_prepare_cross_attention_mask` with empty="all".
    """
    _check_empty("mask_ranges", empty)
    if mask.dim() != 4 or not mask.shape[2] * mask.shape[3] or tile_tokens < 1:
        raise ValueError(f"fastmllm::mask_ranges: mask {tuple(mask.shape)} must be (B, T, I, tiles) with tiles of at "
                         f"least one token, got {tile_tokens}")  # fmt: skip
    seen = mask.flatten(2) != 0  # (B, T, M)
    num_tiles = seen.shape[2]
    tile = torch.arange(num_tiles, device=mask.device)
    first = torch.where(seen, tile, num_tiles).amin(-1)
    stop = torch.where(seen, tile + 1, 0).amax(-1)
    none = stop == 0
    if mask.is_cpu and not torch.compiler.is_compiling() and bool((seen.sum(-1) != stop - first)[~none].any()):
        raise ValueError(f"fastmllm::mask_ranges: a row of mask {tuple(mask.shape)} sees tiles that are not "
                         "neighbours: pack the media without padding tiles and use media_ranges")  # fmt: skip
    first, stop = first.masked_fill(none, 0), stop.masked_fill(none, num_tiles if empty == "all" else 0)
    sample = torch.arange(mask.shape[0], device=mask.device)[:, None] * num_tiles
    start, stop = (((t + sample) * tile_tokens).flatten().to(torch.int32) for t in (first, stop))
    return start, stop


def _check_empty(op: str, empty: str) -> None:
    if empty not in ("zeros", "all"):
        raise ValueError(f'fastmllm::{op}: empty {empty!r} must be "zeros" or "all"')
