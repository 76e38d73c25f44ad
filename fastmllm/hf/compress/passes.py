"""One call's way through the layers of a language model that lose visual tokens on the way."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmllm.compression import Compressor, Probe
from fastmllm.compression.reduction import Reduction, VisualRows
from fastmllm.compression.tokens import cumulative
from fastmllm.hf.compress.cached import Held, Left, text
from fastmllm.hf.compress.listening import Listener
from fastmllm.hf.compress.masks import gathered, mask_of
from fastmllm.hf.compress.rows import PAD, Images, Rows, shorten
from fastmllm.hf.compress.scores import Behind, text_probe

if TYPE_CHECKING:
    from fastmllm.hf.compress.prompt import Prompt


class Pass:
    """Drop tokens in front of layers, and lay out for those behind what belongs to the rest.

    Args:
        stages: (layer, compressor).
        held: what the cache holds.
        batch: rows B and columns T of the text that is new.
        device: of the text.
        prompt: with images, or None: nothing is dropped.
        flash: layers take a mask of two dimensions.

    Attributes:
        rows: of each stage, which columns are left in front of its layer; None: all of the call's.
        layer: the last one that was entered.
    """

    @torch.compiler.disable
    def __init__(
        self, stages: Sequence[tuple[int, Compressor]], held: Held, batch: tuple[int, int], device: torch.device,
        prompt: Prompt | None, flash: bool,
    ) -> None:  # fmt: skip
        self.stages, self.layers, self.held, self.flash = dict(stages), [n for n, _ in stages], held, flash
        self.batch, self.layer = batch, 0
        self.total = held.columns + batch[1]
        self.rows: list[Rows | None] = [None] * len(stages)
        self.reduction: Reduction | None = None
        whole = text(held.columns, batch[1], batch[0], device)
        self.new = [whole] * (len(stages) + 1)  # of each group of layers
        self._made: dict[Any, tuple[Any, Any]] = {}
        if prompt is not None:
            self._plan(prompt, device)

    @property
    def loses(self) -> bool:
        """Whether any layer sees other columns than the text has."""
        return any(x is not None for x in (*self.rows, *self.held.left))

    def _plan(self, prompt: Prompt, device: torch.device) -> None:
        ids, past = prompt.ids.cpu(), self.held.columns
        mask = None if prompt.mask is None else prompt.mask[:, -ids.shape[1] :]
        valid = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask != 0
        counts = valid.sum(1).tolist()
        index = (ids == prompt.token)[valid].nonzero()[:, 0]
        if len(index) != sum(prompt.seqlens):
            raise ValueError(
                f"compress: image features and image tokens do not match, tokens: {len(index)}, features: "
                f"{sum(prompt.seqlens)}"
            )
        visual = VisualRows.of_batch(
            index, prompt.seqlens, cumulative(counts, index.device), prompt.answers(valid), device, prompt.grid
        )
        self.reduction = Reduction(list(self.stages.items()), visual)
        for number, layer in enumerate(self.layers):
            after = self.reduction.budgets[layer]
            if after != prompt.seqlens:
                images = Images(prompt.seqlens, after)
                self.rows[number] = shorten(prompt.ids, prompt.token, images, mask=mask, left=prompt.left, past=past)
        self._slots = [valid.flatten().nonzero()[:, 0].to(device)] * (len(self.layers) + 1)
        self._at = self.new[0].index.flatten().index_select(0, self._slots[0])  # (Tp,) column of each row, packed
        self._valid, self._host = valid, prompt.mask

    def group(self, layer: int) -> int:
        """Return how many stages stand in front of a layer, its own included."""
        return bisect_right(self.layers, layer)

    @torch.compiler.disable
    def enter(self, layer: int, x: Tensor, heard: Listener | None, cache: Any) -> Tensor:
        """Drop what a layer's stage drops of (B, T, D)."""
        self.layer = layer
        compressor, number = self.stages.get(layer), self.group(layer)
        rows = None if compressor is None else self.rows[number - 1]
        if rows is None:
            return x
        if x.device != rows.index.device:
            raise ValueError(
                f"compress: layer {layer} is on {x.device}, the text on {rows.index.device}: stages inside of a "
                "language model want it on one device"
            )
        assert self.reduction is not None
        probe = None if heard is None else self._probe(number - 1, heard, cache)
        packed = x.flatten(0, 1).index_select(0, self._slots[number - 1])  # (Tp, D)
        packed, self._at, _ = self.reduction.apply(layer, packed, self._at, probe)
        shape = rows.index.shape
        slots = torch.nonzero_static(rows.index.flatten() != PAD, size=len(packed))[:, 0]
        bias, of = None, self.reduction.key_bias
        if of is not None:
            if self.flash:
                raise ValueError("compress: merged or calibrated tokens want a bias on attention, which flash has not")
            bias = of.new_zeros(shape.numel()).index_copy(0, slots, of).view(shape)
        index = rows.index.flatten().index_copy(0, slots, self._at).view(shape)
        left = Left(index, len(packed) < shape.numel(), bias)
        self.new[number:] = [left] * (len(self.new) - number)
        self._slots[number:] = [slots] * (len(self._slots) - number)
        return x.new_zeros(shape.numel(), x.shape[2]).index_copy(0, slots, packed).view(*shape, -1)

    def whole(self, number: int) -> Left:
        """Return the columns that a group of layers has seen, the cache's too."""
        before = self.held.left[number - 1] if number else None
        new = self.new[number]
        if before is None:
            if not self.held.columns:
                return new
            before = text(0, self.held.columns, self.batch[0], new.index.device)
        return before.then(new)

    def lost(self, number: int) -> bool:
        """Whether a group of layers sees other columns than the text has."""
        return number > 0 and (self.held.left[number - 1] is not None or any(r is not None for r in self.rows[:number]))

    @property
    def left(self) -> tuple[Left | None, ...]:
        """The columns that are left behind each stage, the cache's too; None: all."""
        return tuple(self.whole(n) if self.lost(n) else None for n in range(1, len(self.new)))

    @torch.compiler.disable
    def arranged(self, layer: int, call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Return a layer's arguments for the rows that it sees."""
        number = self.group(layer)
        if not self.lost(number):
            return call
        new, columns = self.new[number].index, self.held.columns
        call = dict(call)
        if new is not self.new[0].index:
            inside = torch.where(new == PAD, PAD, new - columns)
            turned = call["position_embeddings"]
            made = self._once((number, "positions"), turned, lambda: tuple(gathered(x, inside) for x in turned))
            call["position_embeddings"] = made
            ids = call.get("position_ids")
            call["position_ids"] = None if ids is None or self.flash else gathered(ids[..., None], inside)[..., 0]
        mask, cache = call.get("attention_mask"), call.get("past_key_values")
        call["attention_mask"] = self._once((number, "mask"), mask, lambda: self._mask(layer, mask, dtype, cache))
        return call

    def _once(self, name: Any, of: Any, make: Any) -> Any:
        """Return what all layers of a group derive alike, made once."""
        found = self._made.get(name)
        if found is None or found[0] is not of:
            found = self._made[name] = (of, make())
        return found[1]

    def _mask(self, layer: int, mask: Any, dtype: torch.dtype, cache: Any) -> Tensor | None:
        if mask is not None and not isinstance(mask, Tensor):
            raise ValueError(f"compress: {type(mask).__name__}: attention masks of flex_attention are not shortened")
        number = self.group(layer)
        whole, new = self.whole(number), self.new[number].index
        first = whole.index.shape[1] - new.shape[1]
        if first and getattr(cache.layers[layer], "is_sliding", False):  # it gives the last ones alone
            first = max(first - cache.layers[layer].sliding_window + 1, 0)
        else:
            first = 0
        return mask_of(
            mask, new, whole.index[:, first:], self.total, flash=self.flash, padded=whole.padded,
            bias=None if whole.bias is None else whole.bias[:, first:], dtype=dtype,
        )  # fmt: skip

    def _probe(self, number: int, heard: Listener, cache: Any) -> Probe:
        """Return the attention of the layer in front, over the rows of its group."""
        assert self.reduction is not None
        if heard.window is not None and self.total > heard.window:
            raise ValueError(
                f"compress: a text of {self.total} tokens is longer than the sliding window of {heard.window} of the "
                "layers whose attention judges its images"
            )
        behind = None
        if self.held.columns:
            behind = Behind(self.whole(number), self.held.columns, self._host, cache.layers[heard.layer].keys)
        return text_probe(heard, self._slots[number], self.reduction, behind)
