"""Shorten what a call says about its text, by what is left of its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastmllm.hf.compress.cached import RECORD, Held, Left, held, note, text
from fastmllm.hf.compress.media import IMAGE, VIDEO, Medium, in_order
from fastmllm.hf.compress.positions import positions
from fastmllm.hf.compress.rows import Images, Rows, shorten
from fastmllm.hf.compress.state import Compression, Encoding, encoded

FILL = {"labels": -100, "shift_labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0}
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def encode(state: Compression, owner: Any, call: dict[str, Any]) -> dict[Medium, Images]:
    """Encode and compress a call's images and videos, and hold what comes out until the model asks for it.

    Raises:
        ValueError: budgets that are one an image, for images and videos.
    """
    media = [medium for medium in (IMAGE, VIDEO) if call.get(medium.pixels) is not None]
    if len(media) > 1 and not isinstance(state.compressor.keep, int | float):
        raise ValueError("compress: budgets one an image, and a call with images and videos: give one for all of them")
    for medium in media:
        features = encoded(owner, call, medium)
        assert state.now.images is not None
        state.now.held[medium] = Encoding(features, state.now.images, len(call[medium.pixels]))
    return {medium: state.now.held[medium].images for medium in media}


def refuse_other_inputs(
    call: dict[str, Any],
    features: tuple[str, ...] = ("mm_encoder_outputs", "image_hidden_states"),
    videos: bool = False,
) -> None:
    """Refuse what brings visual tokens in past the compressor, image features under some names included.

    Args:
        call: arguments by name.
        features: names of such.
        videos: they are compressed, too.
    """
    if call.get("pixel_values_videos") is not None and not videos:
        raise ValueError("compress: videos of this model are not compressed: unpatch it for them")
    for name in features:
        if call.get(name) not in (None, {}):
            raise ValueError(
                f"compress: {name}: image features that are there already; give pixel_values, and unpatch a model that "
                "drafts for another as its assistant_model"
            )
    if call.get("input_ids") is None and any(call.get(medium.pixels) is not None for medium in (IMAGE, VIDEO)):
        raise ValueError("compress: placeholders are looked for among input_ids, not among inputs_embeds")


def remember(cache: Any, owner: Any, rows: Rows, times: int = 1) -> None:
    """Note on a cache what it holds of the text as it was given, how far its positions are ahead, and its images' end.

    Args:
        cache: or None.
        owner: the module that makes image features.
        rows: what is left of the text.
        times: each row is repeated.
    """
    if cache is not None:
        seen, lead = getattr(cache, RECORD, Held()), getattr(owner, "rope_deltas", None)
        lead = None if lead is None else lead.expand(len(rows.index), -1).repeat_interleave(times, 0)
        kept = Left(rows.whole.repeat_interleave(times, 0))
        behind = rows.behind or (seen.behind if rows.past else 0)
        note(cache, replace(seen, given=rows.past + rows.columns, kept=kept, behind=behind, lead=lead))


@torch.compiler.disable
def shorten_text(
    state: Compression,
    owner: Any,
    call: dict[str, Any],
    found: Mapping[Medium, Images],
    *,
    left: bool,
    whole: bool = False,
) -> Rows | None:
    """Rewrite the arguments of a call in place.

    Args:
        state: of the model.
        owner: the module that makes image features, which knows its placeholder and its positions.
        call: arguments by name.
        found: what the call's images and videos have lost.
        left: where rows of different lengths are padded, if the call's mask does not say.
        whole: `input_ids` may hold the cache's text too, as `generate` takes it; they do if the mask is as long.

    Returns:
        What is left; None where nothing is to be rewritten.

    Raises:
        ValueError: something in the call that does not go along.
    """
    ids, cache = call["input_ids"], call.get("past_key_values")
    have = held(cache, len(ids))
    if all(images.before == images.after for images in found.values()) and have.kept is None:
        return None
    past = have.given
    cached = (have.kept or text(0, past, len(ids), ids.device)).index.to(ids.device) if past else None
    mask = call.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ValueError("compress: attention_mask must be (rows, tokens), of which tokens can be taken out")
    whole = whole and ids.shape[1] > past and (mask is None or mask.shape[1] == ids.shape[1])
    new = ids[:, past:] if whole else ids
    seen = None if mask is None else mask[:, mask.shape[1] - new.shape[1] :]
    host = None if seen is None else seen.cpu()
    if host is not None:
        left = bool((host[:, 0] == 0).any()) or (left and not bool((host[:, -1] == 0).any()))
    marked, token, images, kinds = in_order(new, owner.config, found)
    refuse_beside(call, images)
    rows = shorten(marked, token, images, mask=host, left=left, past=past, cached=cached)
    for medium in found:
        own = [row for row, kind in zip(rows.owners, kinds, strict=True) if kind is medium]
        state.now.held[medium].owners = tuple(own.count(row) for row in range(len(new)))
    shortened = {"input_ids": rows.take(ids, _pad_id(owner)), "attention_mask": rows.mask(mask)}
    shortened |= positions(state, owner, call, rows, new, seen, shortened["attention_mask"])
    for name, fill in FILL.items():
        if call.get(name) is not None:
            shortened[name] = rows.take(call[name], fill)
    call.update(shortened)
    return rows


def refuse_beside(call: dict[str, Any], images: Images) -> None:
    """Refuse what says something of the text's tokens, and cannot be shortened with it."""
    for name in PACKED:
        if call.get(name) is not None:
            raise ValueError(f"compress: {name}: texts packed into one row keep their boundaries beside the text")
    if isinstance(call.get("logits_to_keep"), Tensor) and images.before != images.after:
        raise ValueError("compress: logits_to_keep counts tokens of the text, and some of them are gone: give a number")


def _pad_id(owner: Any) -> int:
    return getattr(owner.config.get_text_config(), "pad_token_id", None) or 0
