"""Read the queries and keys of one layer while it runs with whatever attention it has: of a tower, or of a text."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

from torch import Tensor, nn

from fastmllm.compression import Compressor
from fastmllm.hf.compress.fitting import has_class_token, reads_first_row
from fastmllm.hf.compress.seams import KEY
from fastmllm.hf.fusion import Fusion, arguments, fuse, is_fused

PROJECTIONS = ("q_proj", "k_proj")
LAYER = re.compile(r"(^|\.)(layers?|blocks)\.\d+\.(self_attn|attn|attention)$")


class Heard(threading.local):
    """What a layer leaves while a thread listens to it, by name; no other thread sees it, and copies begin anew."""

    def __init__(self) -> None:
        self.listening = False
        self.watched: dict[str, Tensor] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Heard, ()


class Watched(Fusion):
    """What gives a layer's queries; attention itself stays as it is."""

    op = "compress"
    what: ClassVar[str] = "queries"

    @classmethod
    def forward(cls, module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        y = original(module, *args, **kwargs)
        now = module.__dict__[KEY].now
        if now.listening:
            now.watched[cls.what] = y.detach()
        return y


class WatchedKeys(Watched):
    """The same of keys."""

    what = "keys"


class WatchedPacked(Watched):
    """The same of queries, keys and values in one projection, which the attention turns by their positions."""

    what = "packed"


class WatchedCall(Fusion):
    """A tower's attention that is read: by which positions it turns, and that nothing is hidden from it."""

    op = "compress"

    @staticmethod
    def forward(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        listener: Listener = module.__dict__[KEY]
        if listener.now.listening:
            call = arguments(original, args, kwargs)
            if call.get("position_embeddings") is not None:
                listener.turned(call["position_embeddings"])
            if hides(call.get("attention_mask")):
                raise ValueError(
                    f"compress: {listener.judge} judges by the tower's attention, and patches of these images are "
                    "padding that is masked there: give images without padding inside (pixel_attention_mask of ones), "
                    "or a method that judges by features"
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


class Listener:
    """Listen to one layer's attention.

    Args:
        attention: the module.
        parts: its modules that give queries and keys, and how they are watched.
        judge: who judges by it.
        layer: its number, in a language model.
        window: of tokens that a row sees there, or None.
    """

    def __init__(
        self, attention: Any, parts: Mapping[str, type[Watched]], judge: str, layer: int = 0, window: int | None = None
    ) -> None:
        self.attention, self.parts, self.judge, self.layer, self.window = attention, parts, judge, layer, window
        self.now = Heard()

    def __deepcopy__(self, memo: dict[int, Any]) -> Listener:
        """Go along with a copy of the layer; a copy of its projection alone (PEFT's) stays a part of it."""
        if id(self.attention) not in memo:
            return self
        attention = copy.deepcopy(self.attention, memo)
        memo[id(self)] = copied = Listener(attention, self.parts, self.judge, self.layer, self.window)
        return copied

    def turned(self, by: tuple[Tensor, Tensor]) -> None:
        """Note cosines and sines by which the layer turns queries and keys."""
        self.now.watched["cos"], self.now.watched["sin"] = by

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Listen while the layer runs, to the projections that stand in it now: LoRA comes and goes.

        Raises:
            ValueError: another operator stands in a projection's place.
        """
        for name, fusion in self.parts.items():
            projection = getattr(self.attention, name)
            if KEY in projection.__dict__:
                continue
            if is_fused(projection):
                raise ValueError(f"compress: {name} of the layer whose attention is read was replaced: patch again")
            fuse(projection, (fusion,))
            projection.__dict__[KEY] = self
        self.now.listening = True
        try:
            yield
        finally:
            self.now.listening = False

    def take(self, *names: str) -> list[Tensor]:
        """Return what the layer has left under some names, once."""
        return [self.now.watched.pop(name) for name in names]

    def forget(self) -> None:
        """Let go of what the layer has left."""
        self.now.watched = {}


def listening(listener: Listener | None) -> AbstractContextManager[None]:
    """Listen, if anybody does."""
    return nullcontext() if listener is None else listener.listen()


def listener_of(tower: Any, compressor: Compressor) -> Listener:
    """Return what listens to the layer of a tower whose attention a compressor reads.

    Args:
        tower: that has the layer.
        compressor: which names the layer.

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
    if not has_class_token(tower) and reads_first_row(compressor):
        refuse(f"{kind} has no class token whose attention could be read: take scorer (or relevance) 'received'")
    return Listener(attention, parts_of(attention), compressor.name)


def watched(listener: Listener, root: nn.Module) -> Iterator[tuple[str, nn.Module, type[Fusion], dict[str, Any], None]]:
    """Yield the modules of the layer of a tower in `root` that is listened to, as `compress_fusions` does."""
    at = next(name for name, module in root.named_modules() if module is listener.attention)
    kept = {KEY: listener}
    yield at, listener.attention, WatchedCall, kept, None
    for part, fusion in listener.parts.items():
        yield f"{at}.{part}", getattr(listener.attention, part), fusion, kept, None
