"""What the parts of a model do while its visual tokens are compressed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmllm.hf.compress.generation import generate
from fastmllm.hf.compress.media import IMAGE, VIDEO, Medium
from fastmllm.hf.compress.merging import same_layer
from fastmllm.hf.compress.projected import filmed, merged, takes_videos
from fastmllm.hf.compress.rows import Images, Rows
from fastmllm.hf.compress.seams import Seam
from fastmllm.hf.compress.state import KEY, Compression, again
from fastmllm.hf.compress.text import encode, refuse_other_inputs, remember, shorten_text
from fastmllm.hf.compress.watch import watch
from fastmllm.hf.fusion import Fusion, arguments, bound_forward


class Connector(Fusion):
    """What stands between tower and language model: it takes K tokens of an image, or gives K."""

    op = "compress"

    @staticmethod
    def forward(module: Any, original: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state: Compression = module.__dict__[KEY]
        if state.now.medium is VIDEO:  # its frames are pooled first
            return original(module, x, *args, **kwargs)
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


def owner_of(seam: Seam) -> type[Owner]:
    """Return what the model without head computes with."""
    if seam.videos:
        return TiledVideoOwner if seam.tiles else VideoOwner
    return TiledOwner if seam.tiles else Owner


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


def features(
    module: Any, original: Callable[..., Any], args: Any, kwargs: dict[str, Any], medium: Medium
) -> Any:  # fmt: skip
    """Encode and compress images or videos, or return what this call has encoded already."""
    state: Compression = module.__dict__[KEY]
    now = state.now
    if now.medium is not None:  # as Qwen3-VL's videos ask for images
        return original(module, *args, **kwargs)
    call = arguments(original, args, kwargs)
    pixels = call[medium.pixels if medium.pixels in call else IMAGE.pixels]  # transformers < 5.23 names both alike
    if medium in now.held:
        return again(now.held[medium], pixels)
    if state.seam.prefix == "Llava" and call.get("image_sizes") is not None:
        raise ValueError("compress: image_sizes: images packed into one row are not compressed")
    if state.inside:
        same_layer(state, call)
    if medium is VIDEO:
        takes_videos(state)
    if state.attention is not None:
        watch(state)
    now.medium, now.images, now.listening = medium, None, state.inside or state.compressor.layer is not None
    try:
        out = original(module, **{**call, "return_dict": True})
        if state.seam.connector is None:
            return merged(state, module, out, call[medium.grids])
        return out if medium is IMAGE else filmed(state, out, pixels.shape[1])
    finally:
        now.medium, now.listening = None, False
        now.watched.clear()


@torch.compiler.disable(recursive=False)  # the text is rewritten on the host; what is called from here is compiled
def shortened(module: Any, owner: Any, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Run a model's forward on a text without the tokens that its images lose."""
    state: Compression = owner.__dict__[KEY]
    if state.now.busy:
        return original(module, *args, **kwargs)
    call = arguments(original, args, kwargs)
    refuse_other_inputs(call, videos=state.seam.videos)
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
