"""What the parts of a model do while its visual tokens are compressed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmllm.compression import Tokens
from fastmllm.hf.compress.generation import generate
from fastmllm.hf.compress.merging import same_layer
from fastmllm.hf.compress.rows import Images, Rows
from fastmllm.hf.compress.state import KEY, Compression
from fastmllm.hf.compress.text import encode, refuse_other_inputs, remember, shorten_text
from fastmllm.hf.compress.watch import watch
from fastmllm.hf.fusion import Fusion, arguments, bound_forward


class Connector(Fusion):
    """What stands between tower and language model: it takes K tokens of an image, or gives K."""

    op = "compress"

    @staticmethod
    def forward(module: Any, original: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state: Compression = module.__dict__[KEY]
        if state.seam.side == "in front of":
            return original(module, state.dense(x), *args, **kwargs)
        return state.dense(original(module, x, *args, **kwargs))


class Owner(Fusion):
    """The model without head, which makes image features and puts them into the text."""

    op = "compress"
    overrides: ClassVar[tuple[str, ...]] = ("forward", "get_image_features")

    @staticmethod
    @torch.compiler.disable(recursive=False)
    def get_image_features(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state: Compression = module.__dict__[KEY]
        call = arguments(original, args, kwargs)
        if state.now.held is not None:
            return state.again(call["pixel_values"])
        if state.seam.prefix == "Llava" and call.get("image_sizes") is not None:
            raise ValueError("compress: image_sizes: images packed into one row are not compressed")
        state.now.images, state.now.listening = None, state.inside or state.compressor.layer is not None
        if state.inside:
            same_layer(state, call)
        if state.attention is not None:
            watch(state)
        try:
            out = original(module, **{**call, "return_dict": True})
            return out if state.seam.connector is not None else _merged(state, module, out, call["image_grid_thw"])
        finally:
            state.now.listening = False
            state.now.watched.clear()

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


class Head(Fusion):
    """The model with a head: text and labels lose the tokens before anything reads them."""

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
    """Run a model's forward on a text without the tokens that its images lose."""
    state: Compression = owner.__dict__[KEY]
    if state.now.busy:
        return original(module, *args, **kwargs)
    call = arguments(original, args, kwargs)
    refuse_other_inputs(call)
    if call.get("input_ids") is None:
        return original(module, **call)
    with state.call():
        images = encode(state, owner, call)
        rows = shorten_text(state, owner, call, images, left=call.get("labels") is None and not module.training)
        out = original(module, **call)
    if rows is not None:
        if module is not state.head and state.head is not None and bound_forward(state.head):
            out = whole(rows, out)
        cache = out.get("past_key_values") if isinstance(out, dict) else call.get("past_key_values")
        remember(cache, owner, rows)
    return out


def whole(rows: Rows, out: Any) -> Any:
    """Give hidden states the columns of the text as it was given, for whoever reads them in place of the head (TRL).

    Labels of tokens that are gone are none; the row that predicts the text behind an image is left of it.
    """
    if not isinstance(out, dict):
        return (rows.spread(out[0]), *out[1:])
    out["last_hidden_state"] = rows.spread(out["last_hidden_state"])
    return out


def _merged(state: Compression, module: Any, out: Any, grid_thw: Tensor) -> Any:
    """Compress what a tower that projects by itself gives: a list of images, and of DeepStack's layers too."""
    side = module.visual.spatial_merge_size
    deep: Any = getattr(out, "deepstack_features", None) or ()
    split = bool(deep) and not isinstance(deep[0], Tensor)  # a list of images, or in transformers < 5.23 one tensor
    layers = [torch.cat(tuple(features)) if split else features for features in deep]
    grids = [(t, h // side, w // side) for t, h, w in grid_thw.tolist()]
    tokens = Tokens.of(torch.cat(tuple(out.pooler_output)), grids, planes=layers)
    kept = state.reduce(tokens)
    if kept is not tokens:
        each = list(kept.seqlens)
        out.pooler_output = kept.x.split(each)
        if layers:
            out.deepstack_features = [plane.split(each) if split else plane for plane in kept.planes]
    return out
