"""The model without head, and with it: their text loses the tokens that its images lose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from fastmllm.hf.compress.features import features, refuse_other_inputs
from fastmllm.hf.compress.generation import generate
from fastmllm.hf.compress.media import IMAGE, VIDEO
from fastmllm.hf.compress.prompt import plan
from fastmllm.hf.compress.rows import Images, Rows
from fastmllm.hf.compress.seams import KEY
from fastmllm.hf.compress.state import Compression
from fastmllm.hf.compress.text import remember, shorten_text
from fastmllm.hf.fusion import Fusion, arguments, bound_forward


class Owner(Fusion):
    """The model without head, which makes image features and puts them into the text."""

    op = "compress"
    overrides: ClassVar[tuple[str, ...]] = ("forward", "get_image_features")

    @staticmethod
    @torch.compiler.disable(recursive=False)
    def get_image_features(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return features(module, original, args, kwargs, IMAGE)

    @staticmethod
    def forward(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return shortened(module, module, original, args, kwargs)


class TiledOwner(Owner):
    """The same of models that lay the tiles of an image out as one grid, with a token behind each of its lines."""

    overrides: ClassVar[tuple[str, ...]] = ("forward", "get_image_features", "pack_image_features")

    @staticmethod
    def pack_image_features(
        module: Any, original: Callable[..., Any], image_features: Any, image_sizes: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Put the tokens that are left of each tile behind each other: they are no lines any more."""
        state: Compression = module.__dict__[KEY]
        assert state.now.images is not None
        whole = state.now.images.before[0]
        if state.now.images.before == state.now.images.after:
            packed, lengths = original(module, image_features, image_sizes, *args, **kwargs)
            state.now.images = Images(tuple(map(len, packed)), tuple(map(len, packed)))
            return packed, lengths
        blank = {**kwargs, "image_newline": torch.zeros(1)}  # how many tokens there would have been
        would, _ = original(
            module, [torch.zeros(len(f), whole, 1) for f in image_features], image_sizes, *args, **blank
        )
        packed = [features.flatten(0, 1) for features in image_features]
        state.now.images = Images(tuple(map(len, would)), tuple(map(len, packed)))
        return packed, torch.tensor(state.now.images.after, device=packed[0].device)


class VideoOwner(Owner):
    """The same of models that make features of videos, too."""

    overrides: ClassVar[tuple[str, ...]] = (*Owner.overrides, "get_video_features")

    @staticmethod
    @torch.compiler.disable(recursive=False)
    def get_video_features(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return features(module, original, args, kwargs, VIDEO)


class TiledVideoOwner(TiledOwner, VideoOwner):
    """The same of models that do both."""

    overrides: ClassVar[tuple[str, ...]] = tuple(dict.fromkeys((*TiledOwner.overrides, *VideoOwner.overrides)))


def owner_of(state: Compression) -> type[Owner]:
    """Return what the model without head computes with."""
    seam = state.seam
    if state.compressor is None:
        return Owner
    if seam.videos:
        return TiledVideoOwner if seam.tiles else VideoOwner
    return TiledOwner if seam.tiles else Owner


class Head(Fusion):
    """The model with a head: labels lose the tokens before anything reads them."""

    op = "compress"
    overrides = ("forward", "generate")

    @staticmethod
    def forward(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return shortened(module, module.model, original, args, kwargs)

    @staticmethod
    def generate(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return generate(module, original, arguments(original, args, kwargs))


@torch.compiler.disable(recursive=False)  # the text is rewritten on the host; what is called from here is compiled
def shortened(module: Any, owner: Any, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Run a model's forward on a text without the tokens that its images lose: in front of it, then on the way."""
    state: Compression = owner.__dict__[KEY]
    if state.now.busy:
        return original(module, *args, **kwargs)
    call = arguments(original, args, kwargs)
    front = state.compressor is not None and not state.now.shortened
    if front or state.stages:
        refuse_other_inputs(state, call, front)
    replaced = None if module is state.head or state.head is None else bound_forward(state.head)
    if replaced and module.training and state.judged:
        raise ValueError(
            "compress: where an answer begins decides what is left, and the forward that somebody has put in place of "
            f"the model's keeps its labels back ({replaced}): a method that does not judge by attention"
        )
    rows = left = None
    with state.call(busy=True, shortened=True, way=None):
        if front and call.get("input_ids") is not None:
            rows = shorten_text(state, call, left=call.get("labels") is None and not module.training)
        if state.stages:
            left = plan(state, call)
        if module is state.head and not (rows is None and left is None):
            _refuse_kept_back(call)
        way = state.now.way
        out = original(module, **call)
    for lost in (left, rows) if replaced else ():
        out = out if lost is None else whole(lost, out)
    cache = out.get("past_key_values") if isinstance(out, dict) else call.get("past_key_values")
    remember(cache, owner, rows, way)
    return out


def _refuse_kept_back(call: dict[str, Any]) -> None:
    """Refuse a call of a Trainer that counts labels and keeps them back, to compare them with logits that are fewer.

    Raises:
        ValueError: says so.
    """
    labels = call.get("labels") if call.get("shift_labels") is None else call["shift_labels"]
    if labels is None and call.get("num_items_in_batch") is not None:
        raise ValueError(
            "compress: a Trainer with label_smoothing_factor or compute_loss_func keeps the labels back, and logits "
            "are fewer than they: leave both out, the model's own loss follows what is left of the text"
        )


def whole(rows: Rows, out: Any) -> Any:
    """Give hidden states the columns of the text as it was given, for whoever reads them in place of the head (TRL).

    Labels of tokens that are gone are none; the row that predicts the text behind an image is left of it.
    """
    if not isinstance(out, dict):
        return (rows.spread(out[0]), *out[1:])
    out["last_hidden_state"] = rows.spread(out["last_hidden_state"])
    return out
