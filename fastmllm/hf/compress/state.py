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

from fastmllm.compression import Compressor, Evidence, Tokens
from fastmllm.hf.compress.probes import probe_of
from fastmllm.hf.compress.rows import Images
from fastmllm.hf.compress.seams import Seam
from fastmllm.hf.fusion import STATE

KEY = STATE + "compression"  # where modules keep the one object


class Call(threading.local):
    """What goes from part to part while a thread calls the model; no other thread sees it.

    Attributes:
        images: of the last encoding.
        busy: a call is under way whose text is shortened already.
        held: the image features that it has encoded already, of so many rows of `pixels`.
        owners: images of each row of its text.
        watched: by name, what the layer that is read gives while `listening`: see `probes`.
    """

    def __init__(self) -> None:
        self.images: Images | None = None
        self.busy = False
        self.held: Any = None
        self.pixels = 0
        self.owners: tuple[int, ...] = ()
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
            self.now.busy, self.now.held, self.now.owners = False, None, ()

    @torch.compiler.disable
    def reduce(self, tokens: Tokens) -> Tokens:
        """Compress, and note how many tokens each image had and has."""
        kept, _ = self.compressor(tokens, Evidence(probe=probe_of(self, tokens)))
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

    def again(self, pixels: Tensor) -> Any:
        """Return what is held, in the order of a batch whose rows generation may have repeated for its beams."""
        times = len(pixels) // self.now.pixels
        held = type(self.now.held)(**dict(self.now.held.items()))  # generation writes into what it is given
        vars(held).update(vars(self.now.held))  # transformers < 5.23 sets what its class has no field for
        if times > 1:
            order = repeated(self.now.owners, times)
            held.pooler_output = self._ordered(held.pooler_output, order, times)
            if getattr(held, "deepstack_features", None) is not None:
                held.deepstack_features = [self._ordered(f, order, times) for f in held.deepstack_features]
        return held

    def _ordered(self, features: Any, order: Sequence[int], times: int) -> Any:
        images = self.now.images
        assert images is not None
        if isinstance(features, Tensor) and features.dim() == 3:  # (I, K, D)
            return features[list(order)]
        if isinstance(features, Tensor):  # (T, D)
            return torch.cat(self._ordered(features.split(list(images.after)), order, times))
        if tuple(map(len, features)) != images.after:  # one entry a row
            return [f for f in features for _ in range(times)]
        return [features[i] for i in order]


def encoded(owner: Any, call: dict[str, Any]) -> Any:
    """Encode the images of a call by transformers' method, with those of the call's arguments that it takes."""
    method = owner.get_image_features
    names = inspect.signature(method).parameters
    return method(**{n: call[n] for n in names if call.get(n) is not None}, return_dict=True)


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
