"""Put image features at their placeholders with one copy, without the host reads of `masked_scatter`'s checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmllm.hf.fusion import Fusion
from fastmllm.kernels.insert_features import insert_features


class Places(Tensor):
    """A placeholder mask (B, T, 1) that carries out `embeddings.masked_scatter(mask, features)` by `insert_features`.

    To every other function it is the mask.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.masked_scatter and isinstance(args[1], Places) and not kwargs:
                embeddings, mask, features = args
                return _insert(embeddings, mask.as_subclass(Tensor), features)
            plain = [a.as_subclass(Tensor) if isinstance(a, Places) else a for a in args]
            return func(*plain, **(kwargs or {}))


class UncountedPlaces(Places):
    """Places whose number nobody has compared with that of the features yet."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.masked_scatter and isinstance(args[1], UncountedPlaces):
            embeddings, places, features = args
            with torch._C.DisableTorchFunctionSubclass():
                mask = places.as_subclass(Tensor)
                if int(mask.sum()) * embeddings.shape[-1] != features.numel():  # too many features are ignored
                    return embeddings.masked_scatter(mask, features)
        return super().__torch_function__(func, types, args, kwargs)


def _insert(embeddings: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    features = features.reshape(-1, embeddings.shape[-1])
    # the count is the features', which the host knows; placeholders were compared with it before
    index = mask[..., :1].reshape(-1).nonzero_static(size=len(features))[:, 0]
    return insert_features(embeddings.flatten(0, 1), features, index).view_as(embeddings)


class InsertFeatures(Fusion):
    """`get_placeholder_mask` of models that take images."""

    op = "insert_features"
    overrides = ("get_placeholder_mask",)

    @staticmethod
    def unsupported(module: Any, input_ids: Tensor | None, *args: Any, **kwargs: Any) -> str | None:
        if input_ids is None:
            return "placeholders are looked for among embeddings"
        return "torch.compile traces masked_scatter" if torch.compiler.is_compiling() else None

    @staticmethod
    def get_placeholder_mask(
        module: Any, original: Callable[..., Any], input_ids: Tensor, inputs_embeds: Tensor,
        image_features: Tensor | None = None,
    ) -> Any:  # fmt: skip
        places = _places(input_ids, module.config.image_token_id, inputs_embeds, image_features)
        return original(module, input_ids, inputs_embeds, image_features) if places is None else places


class InsertUncounted(InsertFeatures):
    """The same of models whose method does not see the features, and that do not count placeholders."""

    @staticmethod
    def slower(module: Any, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if device.type == "cpu" else "this model never counts placeholders, which the host would wait for"

    @staticmethod
    def get_placeholder_mask(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return original(module, *args, **kwargs).as_subclass(UncountedPlaces)


class MergeFeatures(InsertFeatures):
    """`inputs_merger` of models that merge in a method of their own."""

    overrides = ("inputs_merger",)

    @staticmethod
    def inputs_merger(
        module: Any, original: Callable[..., Any], input_ids: Tensor, inputs_embeds: Tensor,
        image_hidden_states: Tensor,
    ) -> Any:  # fmt: skip
        features = image_hidden_states.to(inputs_embeds.device, inputs_embeds.dtype)
        places = _places(input_ids, module.config.image_token_id, inputs_embeds, features)
        if places is None:
            return original(module, input_ids, inputs_embeds, image_hidden_states)
        return inputs_embeds.masked_scatter(places, features)


class InsertImagesAndVideos(InsertFeatures):
    """The same of models whose method returns a mask of images and one of videos."""

    @staticmethod
    def get_placeholder_mask(
        module: Any, original: Callable[..., Any], input_ids: Tensor, inputs_embeds: Tensor,
        image_features: Tensor | None = None, video_features: Tensor | None = None,
    ) -> Any:  # fmt: skip
        images = _places(input_ids, module.config.image_token_id, inputs_embeds, image_features)
        videos = _places(input_ids, module.config.video_token_id, inputs_embeds, video_features)
        if images is None or videos is None:
            return original(module, input_ids, inputs_embeds, image_features, video_features)
        return images, videos


def _places(input_ids: Tensor, token_id: int, embeddings: Tensor, features: Tensor | None) -> Tensor | None:
    """Return the mask; None where features and placeholders differ in number: transformers' own code then says so."""
    mask = (input_ids == token_id).unsqueeze(-1).to(embeddings.device)
    if features is None:
        return mask
    fits = mask.sum() * embeddings.shape[-1] == features.numel()
    if mask.device.type != "cpu":
        torch._assert_async(fits, "image features and image tokens do not match")
    elif not fits:
        return None
    return mask.as_subclass(Places)
