"""Shorten what a call says about its text, its positions too, by what the connector leaves of its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastmllm.compression.reduction import IGNORED
from fastmllm.hf.compress.cached import RECORD, Held, Left, held, note, text
from fastmllm.hf.compress.features import encode
from fastmllm.hf.compress.media import IMAGE, VIDEO, Medium, in_order
from fastmllm.hf.compress.passes import Pass
from fastmllm.hf.compress.rows import PAD, Images, Rows, shorten
from fastmllm.hf.compress.state import Compression

LABELS = {"labels": IGNORED, "shift_labels": IGNORED}  # and what fills a row of them up
FILL = {**LABELS, "token_type_ids": 0, "mm_token_type_ids": 0}
GRIDS = (IMAGE.grids, VIDEO.grids, "second_per_grid_ts")
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def remember(cache: Any, owner: Any, rows: Rows | None, way: Pass | None, times: int = 1) -> None:
    """Note on a cache what it holds of the text as it was given.

    Args:
        cache: or None.
        owner: the module that makes image features.
        rows: what is left of the text in front of the first layer; None: all of it.
        way: of that through the layers; None: nothing is gone there.
        times: `rows` are each repeated.
    """
    if cache is None or (rows is None and way is None):
        return
    have = getattr(cache, RECORD, Held())
    if way is not None:
        have = replace(have, columns=way.total, left=way.left)
    if rows is not None:
        lead = getattr(owner, "rope_deltas", None)
        lead = None if lead is None else lead.expand(len(rows.index), -1).repeat_interleave(times, 0)
        kept = Left(rows.whole.repeat_interleave(times, 0))
        behind = rows.behind or (have.behind if rows.past else 0)
        have = replace(have, given=rows.past + rows.columns, kept=kept, behind=behind, lead=lead)
    note(cache, have)


def shorten_text(state: Compression, call: dict[str, Any], *, left: bool, whole: bool = False) -> Rows | None:
    """Encode a call's images and rewrite its arguments in place, without the tokens that the connector takes.

    Args:
        state: of the model.
        call: arguments by name.
        left: where rows of different lengths are padded, if the call's mask does not say.
        whole: `input_ids` may hold the cache's text too, as `generate` takes it; they do if the mask is as long.

    Returns:
        What is left; None where nothing is to be rewritten.

    Raises:
        ValueError: something in the call that does not go along.
    """
    return _shorten(state, state.owner, call, encode(state, call), left, whole)


@torch.compiler.disable
def _shorten(
    state: Compression, owner: Any, call: dict[str, Any], found: Mapping[Medium, Images], left: bool, whole: bool
) -> Rows | None:
    ids, cache = call["input_ids"], call.get("past_key_values")
    have = held(cache, len(ids))
    if all(images.before == images.after for images in found.values()) and have.kept is None:
        return None
    past = have.given
    cached = (have.kept or text(0, past, len(ids), ids.device)).index.to(ids.device) if past else None
    mask, host = call.get("attention_mask"), padding(call)
    whole = whole and ids.shape[1] > past and (mask is None or mask.shape[1] == ids.shape[1])
    new = ids[:, past:] if whole else ids
    seen = None if mask is None else mask[:, mask.shape[1] - new.shape[1] :]
    host, left = ends(host, new.shape[1], left)
    marked, token, images, kinds = in_order(new, owner.config, found)
    refuse_beside(call, images)
    rows = shorten(marked, token, images, mask=host, left=left, past=past, cached=cached)
    for medium in found:
        own = [row for row, kind in zip(rows.owners, kinds, strict=True) if kind is medium]
        state.now.held[medium].owners = tuple(own.count(row) for row in range(len(new)))
    shortened = {"input_ids": rows.take(ids, _pad_id(owner)), "attention_mask": rows.mask(mask)}
    shortened |= _positions(state, owner, call, rows, new, seen, shortened["attention_mask"])
    call.update(shortened)
    follow(call, rows, FILL)
    return rows


def follow(call: dict[str, Any], rows: Rows, fills: Mapping[str, int]) -> None:
    """Take out of what a call says of each token what rows have lost."""
    for name, fill in fills.items():
        if call.get(name) is not None:
            call[name] = rows.take(call[name], fill)


def padding(call: dict[str, Any]) -> Tensor | None:
    """Return a call's mask on the host, 0 where its text is padded, or None.

    Raises:
        ValueError: it is a mask of another kind.
    """
    mask = call.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ValueError("compress: attention_mask must be (rows, tokens), of which tokens can be taken out")
    return None if mask is None else mask.cpu()


def ends(host: Tensor | None, columns: int, left: bool) -> tuple[Tensor | None, bool]:
    """Return the mask of a text's last columns, and whether its rows are padded in front: `left` where it is silent."""
    if host is None:
        return None, left
    new = host[:, host.shape[1] - columns :]
    return new, bool((new[:, 0] == 0).any()) or (left and not bool((new[:, -1] == 0).any()))


def refuse_beside(call: dict[str, Any], images: Images) -> None:
    """Refuse what says something of the text's tokens, and cannot be shortened with it."""
    for name in PACKED:
        if call.get(name) is not None:
            raise ValueError(f"compress: {name}: texts packed into one row keep their boundaries beside the text")
    if isinstance(call.get("logits_to_keep"), Tensor) and images.before != images.after:
        raise ValueError("compress: logits_to_keep counts tokens of the text, and some of them are gone: give a number")


def _pad_id(owner: Any) -> int:
    return getattr(owner.config.get_text_config(), "pad_token_id", None) or 0


def _positions(
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
    if not state.keeps_places or given.dim() != 3:
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
    if images and state.keeps_places:
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
