"""What the parts of a model that compresses visual tokens share, beside its parameters."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastmllm.compression import Compressor, Evidence, TemporalDedup, Tokens
from fastmllm.hf.compress.given import Scores, scores_of
from fastmllm.hf.compress.media import IMAGE, Medium
from fastmllm.hf.compress.probes import probe_of
from fastmllm.hf.compress.rows import Images
from fastmllm.hf.compress.seams import KEY as KEY
from fastmllm.hf.compress.seams import Seam


@dataclass(slots=True)
class Encoding:
    """Images, or videos, that were encoded and compressed.

    Args:
        features: as the model's own method returns them.
        images: how many tokens each had and has.
        pixels: rows of what was encoded.
        owners: images of each row of the text.
    """

    features: Any
    images: Images
    pixels: int
    owners: tuple[int, ...] = ()


class Call(threading.local):
    """What goes from part to part while a thread calls the model; no other thread sees it.

    Attributes:
        medium: what is being encoded.
        images: of the last encoding.
        busy: a call is under way whose text is shortened already.
        held: what it has encoded already.
        given: what the caller says of tokens.
        watched: by name, what the layer that is read gives while `listening`: see `probes`.
    """

    def __init__(self) -> None:
        self.medium: Medium | None = None
        self.images: Images | None = None
        self.busy = False
        self.held: dict[Medium, Encoding] = {}
        self.given: dict[Medium, Scores] = {}
        self.listening = False
        self.watched: dict[str, Tensor] = {}


@dataclass(slots=True, eq=False)
class Compression:
    """One patched model's compressor, which all of its parts share.

    Args:
        compressor: what is computed.
        seam: where.
        owner: the model without head.
        head: the model with head, if there is one.
        cls_token: whether the tower has one.
        attention: the layer of the tower that is read.
        inside: tokens merge inside of the tower.
        now: of the thread's call.
    """

    compressor: Compressor
    seam: Seam
    owner: Any
    head: Any = None
    cls_token: bool = False
    attention: Any = None
    inside: bool = False
    now: Call = field(default_factory=Call)

    def __deepcopy__(self, memo: dict[int, Any]) -> Compression:
        """Go along with a copy of the model; a copy of a part of it (PEFT's `modules_to_save`) stays a part of it."""
        if id(self.owner) not in memo:
            return self
        memo[id(self)] = copied = Compression(
            self.compressor, self.seam, memo[id(self.owner)], cls_token=self.cls_token, inside=self.inside
        )
        copied.compressor, copied.attention = copy.deepcopy((self.compressor, self.attention), memo)
        copied.head = memo.get(id(self.head))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        kept = {n: getattr(self, n) for n in ("head", "cls_token", "attention", "inside", "owner")}
        return _blank, (self.compressor, self.seam), (None, kept)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Mark a call as under way, and let go of what it holds behind it."""
        self.now.busy = True
        try:
            yield
        finally:
            self.now.busy, self.now.held = False, {}

    @torch.compiler.disable
    def reduce(self, tokens: Tokens) -> Tokens:
        """Compress, and note how many tokens each image had and has."""
        kept = tokens
        if not (isinstance(self.compressor, TemporalDedup) and self.now.medium is IMAGE):  # a picture repeats nothing
            given = scores_of(self, tokens)
            kept, _ = self.compressor(tokens, Evidence(probe=probe_of(self, tokens), relevance=given, scores=given))
        if kept.x.shape[1] != tokens.x.shape[1]:
            raise ValueError(
                f"compress: {self.compressor.name} makes tokens {kept.x.shape[1]} wide of tokens {tokens.x.shape[1]} "
                f"wide; the model takes them no wider {self.seam.place}"
            )
        keeps_places = self.seam.mrope and self.compressor.position == "keep" and kept is not tokens
        self.now.images = Images(tokens.seqlens, kept.seqlens, kept.pos[:, 0] if keeps_places else None)
        return kept

    def dense(self, x: Tensor) -> Tensor:
        """Compress (I, N, C) to (I, K, C)."""
        tokens = Tokens.of(x)
        tokens = tokens if self.seam.grid else replace(tokens, grid=None)
        kept = self.reduce(tokens)
        return x if kept is tokens else kept.dense()


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


def encoded(owner: Any, call: dict[str, Any], medium: Medium = IMAGE) -> Any:
    """Encode the images of a call by transformers' method, with those of the call's arguments that it takes."""
    method = getattr(owner, medium.method)
    _, *names = inspect.signature(method).parameters  # the first one is the pixels, whatever it is called
    more = {n: call[n] for n in names if call.get(n) is not None}
    return method(call[medium.pixels], **more, return_dict=True)


def _blank(compressor: Compressor, seam: Seam) -> Compression:
    """Return what unpickling fills: the models that it knows hold it themselves."""
    return Compression(compressor, seam, None)


def repeated(owners: Sequence[int], times: int) -> list[int]:
    """Return the images of rows that are each repeated, one row's images (`owners`) behind the other's."""
    order, first = [], 0
    for count in owners:
        order += list(range(first, first + count)) * times
        first += count
    return order
