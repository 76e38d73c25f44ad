"""Encode images and videos as the model does, and compress what the text is to be given of them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmllm.compression import Tokens
from fastmllm.hf.compress.listening import listening
from fastmllm.hf.compress.media import IMAGE, VIDEO, Medium
from fastmllm.hf.compress.merging import same_layer
from fastmllm.hf.compress.rows import Images
from fastmllm.hf.compress.seams import KEY
from fastmllm.hf.compress.state import Compression, Encoding
from fastmllm.hf.fusion import arguments


def encode(state: Compression, call: dict[str, Any]) -> dict[Medium, Images]:
    """Encode a call's images and videos, compressed at the connector, and hold them until the model asks for them.

    Raises:
        ValueError: budgets that are one an image, for images and videos.
    """
    media = [medium for medium in (IMAGE, VIDEO) if call.get(medium.pixels) is not None]
    keep, now = None if state.compressor is None else state.compressor.keep, state.now
    if len(media) > 1 and not isinstance(keep, int | float):
        raise ValueError("compress: budgets one an image, and a call with images and videos: give one for all of them")
    for medium in media:
        if medium not in now.held:
            now.images = None
            features = _encoded(state.owner, call, medium)
            now.held[medium] = Encoding(features, now.images or Images((), ()), len(call[medium.pixels]))
    return {medium: now.held[medium].images for medium in media}


def _encoded(owner: Any, call: dict[str, Any], medium: Medium) -> Any:
    """Encode by transformers' method, with those of a call's arguments that it takes."""
    method = getattr(owner, medium.method)
    _, *names = inspect.signature(method).parameters  # the first one is the pixels, whatever it is called
    more = {n: call[n] for n in names if call.get(n) is not None}
    return method(call[medium.pixels], **more, return_dict=True)


def refuse_other_inputs(state: Compression, call: dict[str, Any], front: bool) -> None:
    """Refuse what brings visual tokens in past the compressor.

    Args:
        state: of the model.
        call: arguments by name.
        front: image features are compressed in front of the text, so that none may be there already.

    Raises:
        ValueError: names it.
    """
    if call.get(VIDEO.pixels) is not None and (state.stages or not state.seam.videos):
        raise ValueError("compress: videos of this model are not compressed: unpatch it for them")
    for name in ("mm_encoder_outputs", "image_hidden_states") if front else ("image_hidden_states",):
        if call.get(name) not in (None, {}):
            raise ValueError(
                f"compress: {name}: image features that are there already; give pixel_values, and unpatch a model that "
                "drafts for another as its assistant_model"
            )
    if call.get("input_ids") is None and any(call.get(medium.pixels) is not None for medium in (IMAGE, VIDEO)):
        raise ValueError("compress: placeholders are looked for among input_ids, not among inputs_embeds")


def features(module: Any, original: Callable[..., Any], args: Any, kwargs: dict[str, Any], medium: Medium) -> Any:
    """Encode and compress images or videos, or return what this call has encoded already."""
    state: Compression = module.__dict__[KEY]
    now = state.now
    if now.medium is not None:  # as Qwen3-VL's videos ask for images
        return original(module, *args, **kwargs)
    call = arguments(original, args, kwargs)
    pixels = call[medium.pixels if medium.pixels in call else IMAGE.pixels]  # transformers < 5.23 names both alike
    if medium in now.held:
        return again(now.held[medium], pixels)
    if state.compressor is None:
        return original(module, *args, **kwargs)
    if state.seam.prefix == "Llava" and call.get("image_sizes") is not None:
        raise ValueError("compress: image_sizes: images packed into one row are not compressed")
    if state.inside:
        same_layer(state, call)
    if medium is VIDEO:
        takes_videos(state)
    now.medium, now.images = medium, None
    try:
        with listening(state.tower):
            out = original(module, **{**call, "return_dict": True})
        if state.seam.connector is None:
            return merged(state, module, out, call[medium.grids])
        return out if medium is IMAGE else filmed(state, out, pixels.shape[1])
    finally:
        now.medium = None
        if state.tower is not None:
            state.tower.forget()


def merged(state: Compression, module: Any, out: Any, grid_thw: Tensor) -> Any:
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


def takes_videos(state: Compression) -> None:
    """Refuse videos for a compressor that is for what images are there.

    Raises:
        ValueError: says why.
    """

    compressor = state.compressor
    assert compressor is not None

    def refuse(why: str) -> None:
        raise ValueError(f"compress: videos of {state.seam.prefix} with {compressor.name}: {why}")

    if state.seam.connector is None:
        return
    if state.inside:
        refuse("its frames are pooled as grids, and merged tokens are none")
    if compressor.layer is not None:
        refuse("it judges by the tower's attention, and tokens of a frame are pooled from parts of patches")
    if any(True for _ in compressor.parameters()):
        refuse("its weights are for tokens in front of the projector, and those of a video stand behind it")


def filmed(state: Compression, out: Any, frames: int) -> Any:
    """Compress (V, T h w, D) pooled frames; the line's end behind each video, here or put there later, stays."""
    x: Tensor = out.pooler_output
    vision = state.owner.config.vision_config
    side = math.ceil(vision.image_size // vision.patch_size / 2)
    tokens = frames * side**2
    kept = state.reduce(Tokens.of(x[:, :tokens].flatten(0, 1), [(frames, side, side)] * len(x)))
    now = state.now
    assert now.images is not None
    before, after = (tuple(n + 1 for n in side) for side in (now.images.before, now.images.after))
    now.images = Images(before, after)
    if now.images.before != now.images.after:
        out.pooler_output = torch.cat([kept.dense(), x[:, tokens:]], 1)
    return out


def again(encoding: Encoding, pixels: Tensor) -> Any:
    """Return what was encoded, in the order of a batch whose rows generation may have repeated for its beams."""
    times = len(pixels) // encoding.pixels
    held = type(encoding.features)(**dict(encoding.features.items()))  # generation writes into what it is given
    vars(held).update(vars(encoding.features))  # transformers < 5.23 sets what its class has no field for
    if times > 1:
        order = repeated(encoding.owners, times)
        held.pooler_output = _ordered(held.pooler_output, encoding.images, order, times)
        if getattr(held, "deepstack_features", None) is not None:
            held.deepstack_features = [_ordered(f, encoding.images, order, times) for f in held.deepstack_features]
    return held


def _ordered(features: Any, images: Images, order: Sequence[int], times: int) -> Any:
    if isinstance(features, Tensor) and features.dim() == 3:  # (I, K, D)
        return features[list(order)]
    if isinstance(features, Tensor):  # (T, D)
        return torch.cat(_ordered(features.split(list(images.after)), images, order, times))
    if tuple(map(len, features)) != images.after:  # one entry a row
        return [f for f in features for _ in range(times)]
    return [features[i] for i in order]


def repeated(owners: Sequence[int], times: int) -> list[int]:
    """Return the images of rows that are each repeated, one row's images (`owners`) behind the other's."""
    order, first = [], 0
    for count in owners:
        order += list(range(first, first + count)) * times
        first += count
    return order
