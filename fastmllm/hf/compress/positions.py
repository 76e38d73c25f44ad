"""Where tokens stand for the language model when others in front of them are gone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmllm.hf.compress.cached import RECORD, Held
from fastmllm.hf.compress.media import IMAGE, VIDEO
from fastmllm.hf.compress.rows import PAD, Rows
from fastmllm.hf.compress.state import Compression

GRIDS = (IMAGE.grids, VIDEO.grids, "second_per_grid_ts")


def positions(
    state: Compression, owner: Any, call: dict[str, Any], rows: Rows, ids: Tensor, mask: Tensor | None,
    left: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the positions of what is left, or nothing where the model counts them itself."""
    given = call.get("position_ids")
    if given is None:
        grids = any(call.get(medium.grids) is not None for medium in (IMAGE, VIDEO))
        with_images = grids and call.get("mm_token_type_ids") is not None
        if not state.seam.mrope or not (with_images or rows.past):
            return {}
        before = rows.index.new_zeros(len(ids), 1)  # tokens of each row in the cache
        if rows.cached is not None:
            held = rows.cached != PAD if left is None else left[:, : rows.cached.shape[1]]
            before = held.sum(1, keepdim=True)
        return {"position_ids": _multimodal(state, owner, call, rows, ids, mask, before, with_images)}
    if rows.past:
        raise ValueError("compress: position_ids behind a cache: leave them out, they follow from the attention mask")
    if not state.seam.mrope:
        return {"position_ids": rows.renumbered(given)}
    if state.compressor.position != "keep" or given.dim() != 3:
        raise ValueError(f"compress: position_ids {tuple(given.shape)}: leave them out, the model computes them")
    vision = rows.standing(given[-3:])
    if len(given) == 3:
        return {"position_ids": vision}
    return {"position_ids": torch.cat([rows.renumbered(given[0])[None], vision])}


def _multimodal(
    state: Compression, owner: Any, call: dict[str, Any], rows: Rows, ids: Tensor, mask: Tensor | None,
    before: Tensor, images: bool,
) -> Tensor:  # fmt: skip
    """Return (4, B, T') positions: of the text that is left, and where its tokens stood in time, row and column."""
    valid = (rows.index != PAD).long()
    text = (valid.cumsum(1) - 1).clamp(min=0)
    seen = getattr(call.get("past_key_values"), RECORD, Held())
    lead = None if not rows.past else owner.rope_deltas if seen.kept is None else seen.lead
    if images and state.compressor.position == "keep":
        given = {name: call[name] for name in GRIDS if call.get(name) is not None}
        positions, _ = owner.get_rope_index(
            ids, mm_token_type_ids=call["mm_token_type_ids"][:, -ids.shape[1] :], attention_mask=mask, **given
        )
        last = positions.amax((0, 2))[:, None]  # of a grid that text goes on behind, whatever of it is left
        positions = rows.standing(positions)
    else:
        positions = text.expand(3, -1, -1)
        last = text.amax(1, keepdim=True)
    ahead = before + (0 if lead is None else lead)
    positions = positions + ahead
    owner.rope_deltas = last + ahead + 1 - valid.sum(1, keepdim=True) - before
    return torch.cat([(text + before)[None], positions])
