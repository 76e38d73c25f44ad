"""What the parts of a model that compresses visual tokens share, beside its parameters."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from fastmllm.compression import Compressor, Evidence, TemporalDedup, Tokens
from fastmllm.hf.compress.fitting import asks
from fastmllm.hf.compress.given import Scores, scores_of
from fastmllm.hf.compress.listening import Listener
from fastmllm.hf.compress.media import IMAGE, Medium
from fastmllm.hf.compress.passes import Pass
from fastmllm.hf.compress.rows import Images
from fastmllm.hf.compress.scores import tower_probe
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
    """What goes from part to part while a thread calls the model; no other thread sees it, and copies begin anew.

    Attributes:
        busy: a forward is under way.
        shortened: the connector's tokens are taken out of the text already.
        medium: what is being encoded.
        images: of the last encoding.
        held: what the call has encoded already.
        given: what the caller says of tokens.
        way: of the text through layers that drop tokens.
        prompt: columns of the text that `generate` was given, which its answer follows; 0: no such.
        grids: the `image_grid_thw` that it was given, which it hands on with beams' rows repeated, or not at all.
    """

    def __init__(self) -> None:
        self.busy = self.shortened = False
        self.medium: Medium | None = None
        self.images: Images | None = None
        self.held: dict[Medium, Encoding] = {}
        self.given: dict[Medium, Scores] = {}
        self.way: Pass | None = None
        self.prompt = 0
        self.grids: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Call, ()


@dataclass(slots=True, eq=False)
class Compression:
    """How one patched model compresses, which all of its parts share.

    Args:
        seam: of the family.
        owner: the model without head.
        head: the model with head, if there is one.
        compressor: of the tokens that the text is given: at the connector, or in front of cross-attention.
        inside: it merges inside of the tower.
        tower: listens to the layer of the tower that it judges by.
        cls_token: whether the tower has one.
        stages: (layer, compressor) in front of layers of the language model.
        layers: by number, listen to those that stages judge by.
        now: of the thread's call.
    """

    seam: Seam
    owner: Any
    head: Any = None
    compressor: Compressor | None = None
    inside: bool = False
    tower: Listener | None = None
    cls_token: bool = False
    stages: tuple[tuple[int, Compressor], ...] = ()
    layers: dict[int, Listener] = field(default_factory=dict)
    now: Call = field(default_factory=Call)

    def __deepcopy__(self, memo: dict[int, Any]) -> Compression:
        """Go along with a copy of the model; a copy of a part of it (PEFT's `modules_to_save`) stays a part of it."""
        if id(self.owner) not in memo:
            return self
        memo[id(self)] = copied = Compression(self.seam, memo[id(self.owner)], memo.get(id(self.head)))
        copy.deepcopy([x.attention for x in self.listeners], memo)  # listeners go along with these alone
        for name in {f.name for f in fields(self)} - {"seam", "owner", "head"}:
            setattr(copied, name, copy.deepcopy(getattr(self, name), memo))
        return copied

    @property
    def listeners(self) -> list[Listener]:
        return [x for x in (self.tower, *self.layers.values()) if x is not None]

    @property
    def text(self) -> Any:
        """The language model."""
        return getattr(self.owner, self.seam.text)

    @property
    def said(self) -> str | None:
        """What the report says of the tokens that the text is given."""
        if (compressor := self.compressor) is None:
            return None
        place = f"inside of {self.seam.tower}" if self.inside else self.seam.place
        return f"{compressor.name}, K = {compressor.keep}, {compressor.mode}, {place}"

    @property
    def judged(self) -> bool:
        """Whether where a question ends decides what is left."""
        return any(asks(compressor) for _, compressor in self.stages)

    @property
    def keeps_places(self) -> bool:
        """Whether what the connector leaves stands where it stood, in time, row and column."""
        return self.compressor is not None and self.seam.mrope and self.compressor.position == "keep"

    @contextmanager
    def call(self, **marks: Any) -> Iterator[None]:
        """Mark what is under way, and let go behind it of what it holds."""
        now = self.now
        before = {name: getattr(now, name) for name in marks}
        for name, value in marks.items():
            setattr(now, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(now, name, value)
            if not now.busy:
                for listener in self.listeners:
                    listener.forget()
            if not (now.busy or now.shortened):
                now.held = {}

    @torch.compiler.disable
    def reduce(self, tokens: Tokens) -> Tokens:
        """Compress, and note how many tokens each image had and has."""
        assert self.compressor is not None
        kept = tokens
        if not (isinstance(self.compressor, TemporalDedup) and self.now.medium is IMAGE):  # a picture repeats nothing
            given = scores_of(self, tokens)
            kept, _ = self.compressor(tokens, Evidence(probe=tower_probe(self, tokens), relevance=given, scores=given))
        if kept.x.shape[1] != tokens.x.shape[1]:
            raise ValueError(
                f"compress: {self.compressor.name} makes tokens {kept.x.shape[1]} wide of tokens {tokens.x.shape[1]} "
                f"wide; the model takes them no wider {self.seam.place}"
            )
        stand = kept.pos[:, 0] if self.keeps_places and kept is not tokens else None
        self.now.images = Images(tokens.seqlens, kept.seqlens, stand)
        return kept

    def dense(self, x: Tensor) -> Tensor:
        """Compress (I, N, C) to (I, K, C)."""
        tokens = Tokens.of(x)
        tokens = tokens if self.seam.grid else replace(tokens, grid=None)
        kept = self.reduce(tokens)
        return x if kept is tokens else kept.dense()
