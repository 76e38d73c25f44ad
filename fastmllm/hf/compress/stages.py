"""Compressors in front of layers of a Hugging Face model's language model (FastV, PyramidDrop, SparseVLM, DART).

What is scored, dropped and merged is `fastmllm.compression.reduction`'s, as in fastmllm's own models. A stage runs when
its layer is called, so that gradient checkpointing recomputes the layer on the rows that it had; positions stay, and
each group of layers has its own mask and its own length of cache.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastmllm.compression import Compressor, PivotDedup
from fastmllm.compression.reduction import IGNORED
from fastmllm.hf.compress.cached import RECORD, Held, held, note
from fastmllm.hf.compress.listening import Listener
from fastmllm.hf.compress.passes import Pass
from fastmllm.hf.compress.prompt import Prompt, image_lengths, images_of_rows
from fastmllm.hf.compress.rows import Images, Rows
from fastmllm.hf.compress.seams import Seam
from fastmllm.hf.compress.state import encoded, repeated
from fastmllm.hf.compress.text import refuse_beside
from fastmllm.hf.fusion import STATE

STAGES = STATE + "stages"  # where modules keep the one object
NUMBER = STATE + "layer"


class Current(threading.local):
    """What goes from part to part while a thread calls the model; no other thread sees it.

    Attributes:
        busy: a call is under way.
        held: the image features that it has encoded already.
        way: of its text through the layers.
        prompt: columns of the text that `generate` was given, which its answer follows; 0: no such.
        grids: the `image_grid_thw` that it was given, which it hands on with beams' rows repeated, or not at all.
    """

    def __init__(self) -> None:
        self.busy = False
        self.held: Any = None
        self.way: Pass | None = None
        self.prompt = 0
        self.grids: Tensor | None = None


@dataclass(slots=True, eq=False)
class Stages:
    """One patched model's stages, which all of its parts share.

    Args:
        stages: (layer, compressor).
        seam: of the family.
        owner: the model without head.
        text: the language model.
        head: the model with head, if there is one.
        listeners: of the layers whose attention is read.
        now: of the thread's call.
    """

    stages: tuple[tuple[int, Compressor], ...]
    seam: Seam
    owner: Any
    text: Any
    head: Any = None
    listeners: dict[int, Listener] = field(default_factory=dict)
    now: Current = field(default_factory=Current)

    def __deepcopy__(self, memo: dict[int, Any]) -> Stages:
        """Go along with a copy of the model; a copy of a part of it (PEFT's `modules_to_save`) stays a part of it."""
        if id(self.owner) not in memo:
            return self
        memo[id(self)] = copied = Stages(self.stages, self.seam, memo[id(self.owner)], None, memo.get(id(self.head)))
        copy.deepcopy([x.attention for x in self.listeners.values()], memo)  # listeners go along with these alone
        copied.stages, copied.listeners, copied.text = copy.deepcopy((self.stages, self.listeners, self.text), memo)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        kept = {n: getattr(self, n) for n in ("owner", "text", "head", "listeners")}
        return Stages, (self.stages, self.seam, None, None), (None, kept)

    @property
    def judged(self) -> bool:
        """Whether where a question ends decides what is left."""
        return any(asks(compressor) for _, compressor in self.stages)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Mark a call as under way, and let go of what it holds behind it."""
        self.now.busy = True
        try:
            yield
        finally:
            self.now.busy, self.now.held, self.now.way = False, None, None
            for listener in self.listeners.values():
                listener.now.watched, listener.now.turned = {}, None

    def begin(self, call: dict[str, Any]) -> Rows | None:
        """Encode a call's images, plan what its layers drop, and shorten its labels.

        Returns:
            What is left of the text behind the last layer; None: all of it.
        """
        ids, cache, embeds = call.get("input_ids"), call.get("past_key_values"), call.get("inputs_embeds")
        text = ids if ids is not None else embeds
        if text is None:
            return None
        (batch, columns), device = text.shape[:2], text.device
        have = held(cache, batch, [layer for layer, _ in self.stages])
        features = (call.get("mm_encoder_outputs") or {}).get("image")  # as `generate` encodes them itself
        if features is None and call.get("pixel_values") is not None:
            features = self.now.held = encoded(self.owner, call)
        prompt = None if ids is None or features is None else self._prompt(call, have, features)
        flash = "flash" in (self.text.config._attn_implementation or "")
        way = Pass(self.stages, have, (batch, columns), device, prompt, flash)
        if not way.loses:
            return None
        self.now.way, rows = way, way.rows[-1]
        if prompt is not None and rows is not None and way.reduction is not None:
            refuse_beside(call, Images(prompt.seqlens, way.reduction.budgets[self.stages[-1][0]]))
            if flash and batch == 1 and _packed(call):
                raise ValueError("compress: texts packed into one row keep their boundaries beside the text in flash")
            for name in ("labels", "shift_labels"):
                if call.get(name) is not None:
                    call[name] = rows.take(call[name], IGNORED)
        return rows

    @torch.compiler.disable
    def _prompt(self, call: dict[str, Any], have: Held, features: Any) -> Prompt:
        ids, mask, labels = call["input_ids"], call.get("attention_mask"), call.get("shift_labels")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise ValueError("compress: attention_mask must be (rows, tokens), of which tokens can be taken out")
        if labels is None and call.get("labels") is not None:
            labels = pad(call["labels"], (0, 1), value=IGNORED)[:, 1:]
        host = None if mask is None else mask.cpu()
        left = labels is None and not self.owner.training
        if host is not None:
            new = host[:, -ids.shape[1] :]
            left = bool((new[:, 0] == 0).any()) or (left and not bool((new[:, -1] == 0).any()))
        token = self.owner.config.image_token_id
        places = ids.cpu() == token
        seqlens = image_lengths(features, places)
        return Prompt(
            ids=ids, token=token, seqlens=seqlens, grid=self._grid(call, seqlens, places), mask=host,
            labels=None if labels is None else labels.cpu(), left=left,
            asked=self.now.prompt - have.columns if self.now.prompt else None,
        )  # fmt: skip

    def _grid(
        self, call: dict[str, Any], seqlens: Sequence[int], places: Tensor
    ) -> tuple[tuple[int, int, int], ...] | None:
        """Return the grid of each image, row by row, if they are some."""
        if self.seam.mrope:
            side, grids = self.owner.visual.spatial_merge_size, call.get("image_grid_thw")
            if grids is None and (grids := self.now.grids) is not None:
                grids = grids[repeated(images_of_rows(seqlens, places)[:: (n := len(seqlens) // len(grids))], n)]
            grid = tuple((t, h // side, w // side) for t, h, w in (() if grids is None else grids.tolist()))
        else:
            grid = tuple((1, math.isqrt(n), math.isqrt(n)) for n in seqlens)
        known = self.seam.grid and not self.seam.tiles and tuple(map(math.prod, grid)) == tuple(seqlens)
        return grid if known else None

    def hold(self, cache: Any, way: Pass | None) -> None:
        """Leave on a cache what it holds behind each stage."""
        if cache is not None and way is not None:
            left = tuple(way.whole(n) if way.lost(n) else None for n in range(1, len(self.stages) + 1))
            note(cache, replace(getattr(cache, RECORD, Held()), columns=way.total, left=left))


def asks(compressor: Compressor) -> bool:
    """Tell whether a compressor judges by attention, not by keys alone (DART)."""
    by_keys = isinstance(compressor, PivotDedup) and compressor.pivots == "norm"
    return compressor.layer is not None and not by_keys


def _packed(call: dict[str, Any]) -> bool:
    positions = call.get("position_ids")
    return positions is not None and bool((positions[..., 1:] < positions[..., :-1]).any())
