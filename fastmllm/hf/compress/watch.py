"""Read the queries and keys of one layer of a tower while it runs with whatever attention it has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fastmllm.compression import Compressor
from fastmllm.hf.compress.state import KEY, Compression
from fastmllm.hf.fusion import Fusion, arguments, fuse, is_fused

PROJECTIONS = ("q_proj", "k_proj")
LAYER = re.compile(r"(^|\.)(layers?|blocks)\.\d+\.(self_attn|attn|attention)$")
CLASS_TOKENS = ("class_embedding", "cls_token")


class Watched(Fusion):
    """What gives a layer's queries; attention itself stays as it is."""

    op = "compress"
    what = "queries"

    @classmethod
    def leave(cls, module: Any, y: Tensor) -> Tensor:
        state: Compression = module.__dict__[KEY]
        if state.now.listening:
            state.now.watched[cls.what] = y.detach()
        return y

    @staticmethod
    def forward(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return Watched.leave(module, original(module, *args, **kwargs))


class WatchedKeys(Watched):
    """The same of keys."""

    what = "keys"

    @staticmethod
    def forward(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return WatchedKeys.leave(module, original(module, *args, **kwargs))


class WatchedPacked(Watched):
    """The same of queries, keys and values in one projection, which the attention turns by their positions."""

    what = "packed"

    @staticmethod
    def forward(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return WatchedPacked.leave(module, original(module, *args, **kwargs))


class WatchedCall(Fusion):
    """The attention that is read: by which positions it turns, and that nothing is hidden from it."""

    op = "compress"

    @staticmethod
    def forward(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state: Compression = module.__dict__[KEY]
        if state.now.listening:
            call = arguments(original, args, kwargs)
            if call.get("position_embeddings") is not None:
                state.now.watched["cos"], state.now.watched["sin"] = call["position_embeddings"]
            if hides(call.get("attention_mask")):
                raise ValueError(
                    f"compress: {state.compressor.name} judges by the tower's attention, and patches of these images "
                    "are padding that is masked there: give images without padding inside (pixel_attention_mask of "
                    "ones), or a method that judges by features"
                )
        return original(module, *args, **kwargs)


def hides(mask: Any) -> bool:
    """Tell whether a mask of attention, 0 and -inf or true and false, hides a key; reads it."""
    if not isinstance(mask, Tensor):
        return False
    return not bool((mask == 0 if mask.is_floating_point() else mask.bool()).all())


def parts_of(attention: Any) -> dict[str, type[Watched]]:
    """Return which modules of an attention give its queries and keys as they are compared; norms have the last word."""
    for names in (("q_norm", "k_norm"), PROJECTIONS):
        if all(isinstance(getattr(attention, name, None), nn.Module) for name in names):
            return dict(zip(names, (Watched, WatchedKeys), strict=True))
    return {"qkv": WatchedPacked} if isinstance(getattr(attention, "qkv", None), nn.Module) else {}


def watch(state: Any, parts: Mapping[str, type[Watched]] | None = None) -> None:
    """Watch the projections that stand in the layer now: LoRA puts one around them, and takes it away again.

    Args:
        state: what `attention` belongs to, and whose `now` is told.
        parts: its modules that are watched; `parts_of` it by default.
    """
    for name, fusion in (parts_of(state.attention) if parts is None else parts).items():
        projection = getattr(state.attention, name)
        if KEY in projection.__dict__:
            continue
        if is_fused(projection):
            raise ValueError(f"compress: {name} of the layer whose attention is read was replaced: patch again")
        fuse(projection, (fusion,))
        projection.__dict__[KEY] = state


def watched(
    tower: Any, at: str, compressor: Compressor, state: Compression
) -> Iterator[tuple[str, nn.Module, type[Fusion], dict[str, Any], None]]:
    """Yield the modules of the layer whose attention a compressor reads, as `compress_fusions` does.

    Args:
        tower: that has the layer.
        at: its name in the model.
        compressor: which names the layer.
        state: of the model.

    Raises:
        ValueError: the tower has no such layer, or this layer's attention cannot be judged by.
    """
    layers = [(name, module) for name, module in tower.named_modules() if LAYER.search(name) and parts_of(module)]
    wanted, kind = compressor.layer, type(tower).__name__
    assert wanted is not None

    def refuse(why: str) -> None:
        raise ValueError(f"patch: {compressor.name} judges by the attention of layer {wanted}, but {why}")

    if not -len(layers) <= wanted < len(layers):
        refuse(f"{kind} has {len(layers)} whose queries and keys we know")
    name, attention = layers[wanted]
    if getattr(attention, "scale", getattr(attention, "scaling", None)) != attention.head_dim**-0.5:
        refuse(f"{name} of {kind} has a scale of its own")
    whole = getattr(tower, "fullatt_block_indexes", None)
    if whole is not None and wanted % len(layers) not in whole:
        refuse(f"{name} of {kind} looks inside of windows alone: take one of layers {', '.join(map(str, whole))}")
    state.attention = attention
    state.cls_token = has_class_token(tower)
    if not state.cls_token and _first_row(compressor):
        refuse(f"{kind} has no class token whose attention could be read: take scorer (or relevance) 'received'")
    kept = {KEY: state}
    yield f"{at}.{name}", attention, WatchedCall, kept, None
    for part, fusion in parts_of(attention).items():
        yield f"{at}.{name}.{part}", getattr(attention, part), fusion, kept, None


def has_class_token(tower: nn.Module) -> bool:
    """Tell whether a tower puts a token of its own in front of the patches."""
    return any(name.rpartition(".")[2] in CLASS_TOKENS for name, _ in tower.named_parameters())


def _first_row(compressor: Any) -> bool:
    """Tell whether a compressor reads the class token's attention."""
    if getattr(compressor, "relevance", None) == "cls_row":
        return True
    return getattr(compressor, "scorer", None) == "cls_row" and getattr(compressor, "pivots", "score") == "score"
