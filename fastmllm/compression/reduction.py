"""Drop or merge visual tokens between two layers of a language model, and everything that goes with them.

FastV (arXiv 2403.06764), PyramidDrop (arXiv 2410.17247), SparseVLM (arXiv 2410.04417). Flash stays on: the layer in
front leaves its queries, keys and log-sum-exp, and the scores are one more product with them. How many rows are left is
known to the host, so nothing waits for the device; later layers cache keys and values of what is left alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from fastmllm.compression.budget import tokens_to_keep
from fastmllm.compression.compressor import Compressor, Evidence, Probe
from fastmllm.compression.tokens import Grid, Tokens, boundaries, segments

IGNORED = -100  # a label that is no target


@dataclass(frozen=True, kw_only=True, slots=True)
class VisualRows:
    """Where the visual tokens of a packed batch stand, and who asks about them.

    Args:
        index: (V,) int64 rows of the packed text, image after image, each in its order.
        seqlens: tokens of each image, host.
        owners: the sequence of each image, host, ascending.
        counts: tokens of each sequence, host.
        grid: of each image, where it still is one.
        asking: (T,) fp32, 1 at the last row of each question, which an answer follows; None: the last row of each
            sequence. What looks at a question in training must not look at its answer.
        text: (T,) fp32, 1 at the rows of text that belong to no answer; None: all that are not visual.
    """

    index: Tensor
    seqlens: tuple[int, ...]
    owners: tuple[int, ...]
    counts: tuple[int, ...]
    grid: tuple[Grid, ...] | None = None
    asking: Tensor | None = None
    text: Tensor | None = None

    def __post_init__(self) -> None:
        if self.index.shape != (sum(self.seqlens),) or len(self.owners) != len(self.seqlens):
            raise ValueError(
                f"VisualRows: index {tuple(self.index.shape)} and {len(self.owners)} owners do not fit images of "
                f"{self.seqlens[:8]} tokens"
            )

    @classmethod
    def of_batch(
        cls, index: Tensor, seqlens: Sequence[int], cu_seqlens: Tensor, labels: Tensor | None, device: torch.device,
        grid: tuple[Grid, ...] | None = None,
    ) -> VisualRows:  # fmt: skip
        """Read a packed batch, whose tensors are on the host.

        Args:
            index: (V,) int64 rows of the visual tokens, image after image.
            seqlens: tokens of each image.
            cu_seqlens: (S + 1,) boundaries of the sequences.
            labels: (T,) already shifted, or None: there are no answers.
            device: of the model.
            grid: of each image, if it is one.
        """
        bounds = cu_seqlens.tolist()
        starts = index[torch.tensor([0, *seqlens[:-1]]).cumsum(0)].tolist()
        owners = tuple(bisect_right(bounds, start) - 1 for start in starts)
        asking = text = None
        if labels is not None and bool((labels != IGNORED).any()):
            first = torch.zeros(len(labels), dtype=torch.bool).index_fill(0, cu_seqlens[:-1].long(), True)
            target = labels != IGNORED  # the row predicts a token of an answer
            answer = target.roll(1).logical_and(~first)  # the row is one
            asking = target.logical_and(~answer)
            for owner, start in zip(owners, starts, strict=True):
                if not asking[start : bounds[owner + 1]].any():  # nobody asks behind this image
                    asking[bounds[owner + 1] - 1] = True
            text = (~answer).index_fill(0, index, False)
            asking, text = (t.float().to(device, non_blocking=True) for t in (asking, text))
        return cls(
            index=index.to(device, non_blocking=True), seqlens=tuple(seqlens), owners=owners,
            counts=tuple(b - a for a, b in pairwise(bounds)), grid=grid, asking=asking, text=text,
        )  # fmt: skip


class Reduction:
    """Reduce the visual tokens of one batch on its way through the layers of a language model.

    Args:
        stages: (layer, compressor): what runs in front of that decoder layer, 0 the first one; ascending. Fractions are
            of the tokens in front of the first one.
        visual: where the visual tokens stand.
        labels: (T,) of the packed tokens, or None.

    Attributes:
        visual, labels: of the rows that are left.
        cu_seqlens: (S + 1,) int32 their boundaries.
        rows: (T',) int64 the rows of the batch that are left.
    """

    def __init__(
        self, stages: Sequence[tuple[int, Compressor]], visual: VisualRows, labels: Tensor | None = None
    ) -> None:
        layers = [layer for layer, _ in stages]
        if layers != sorted(set(layers)) or (layers and layers[0] < 0):
            raise ValueError(f"Reduction: layers {layers} must ascend from 0")
        self.budgets: dict[int, tuple[int, ...]] = {}
        before = visual.seqlens
        for layer, compressor in stages:
            if compressor.position == "renumber" and layer:
                raise ValueError(
                    f"Reduction: {compressor.name} renumbers positions in front of layer {layer}, but earlier layers "
                    "keep theirs: position='keep' or 'calibrate', or layer 0"
                )
            if compressor.layer is not None and not layer:
                raise ValueError(
                    f"Reduction: {compressor.name} judges by attention, and in front of layer 0 there is none: later"
                )
            wanted = tokens_to_keep(compressor.name, compressor.keep, visual.seqlens)
            if any(k > n for k, n in zip(wanted, before, strict=True)):
                raise ValueError(
                    f"Reduction: in front of layer {layer} {wanted[:4]} tokens are to be left of {before[:4]}"
                )
            self.budgets[layer] = before = wanted
        self.stages, self.visual, self.labels = dict(stages), visual, labels
        device = visual.index.device
        self.rows = torch.arange(sum(visual.counts), device=device)
        self.cu_seqlens = boundaries(visual.counts, device)[0]
        self.key_bias: Tensor | None = None  # (T',) fp32: log of what each row stands for
        self.kept: Tensor | None = None  # (K,) int64 which of the last stage's visual tokens are left, None: all
        self.fewest_dropped = 0  # tokens that every sequence has lost
        self.renumbered = False

    @property
    def probed(self) -> frozenset[int]:
        """Layers whose attention is read: the ones in front of stages that judge by attention."""
        return frozenset(layer - 1 for layer, compressor in self.stages.items() if compressor.layer is not None)

    @property
    def max_seqlen(self) -> int:
        """The longest sequence of what is left."""
        return max(self.visual.counts)

    def apply(self, layer: int, x: Tensor, position_ids: Tensor, probe: Probe | None) -> tuple[Tensor, Tensor, Tensor]:
        """Run the compressor in front of a layer.

        Args:
            layer: its number, one of `stages`.
            x: (T, D) hidden states.
            position_ids: (T,) or (3, T).
            probe: the attention of the layer in front, of all rows; behind a cache with `columns` (T,) among its keys.

        Returns:
            Hidden states (T', D), position ids and the rows of `x` that are left, (T',) int64.

        Raises:
            ValueError: the compressor's tokens are none of those that it was given, or of another width.
        """
        visual, compressor = self.visual, self.stages[layer]
        if probe is not None:
            # behind a cache `columns` says where each row of x stands among the keys
            columns = visual.index if probe.columns is None else probe.columns.index_select(0, visual.index)
            probe = replace(probe, columns=columns, asking=visual.asking, text=self._text(x))
        size = None if self.key_bias is None else self.key_bias.exp().index_select(0, visual.index)
        pos = position_ids.reshape(-1, len(x)).index_select(1, visual.index).t()
        tokens = replace(Tokens.of(x.index_select(0, visual.index), [(n, 1) for n in visual.seqlens], pos), size=size)
        tokens = replace(tokens, grid=visual.grid)
        kept, plan = compressor(tokens, Evidence(probe=probe), self.budgets[layer])
        self.kept = None if plan is None else plan.keep
        if kept is tokens:
            return x, position_ids, torch.arange(len(x), device=x.device)
        if plan is None or kept.x.shape[1] != x.shape[1]:
            raise ValueError(
                f"Reduction: {compressor.name} gives tokens that are none of those in, or of another width "
                f"({kept.x.shape[1]}, not {x.shape[1]}): it has no place inside of a language model"
            )
        stands = visual.index.index_select(0, plan.keep)  # rows of x
        mark = torch.ones(len(x), dtype=torch.bool, device=x.device)
        mark.index_fill_(0, visual.index, False).index_fill_(0, stands, True)
        left = _counts(visual, kept.seqlens)
        rows = torch.nonzero_static(mark, size=sum(left)).view(-1)
        x = x.index_copy(0, stands, kept.x.to(x.dtype))  # what stands at a row may be a mixture
        if kept.size is not None:
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            bias = x.new_zeros(len(x), dtype=wide) if self.key_bias is None else self.key_bias
            self.key_bias = bias.index_copy(0, stands, kept.size.detach().to(wide).log()).index_select(0, rows)
        self._follow(stands, kept, rows, mark, left)
        if compressor.position == "renumber":
            self.renumbered = True
            return x.index_select(0, rows), boundaries(left, x.device)[1], rows
        return x.index_select(0, rows), position_ids.index_select(-1, rows), rows

    def _text(self, x: Tensor) -> Tensor:
        """Return (T,) 1 at the rows of questions."""
        if self.visual.text is not None:
            return self.visual.text
        return torch.ones(len(x), device=x.device).index_fill(0, self.visual.index, 0.0)

    def _follow(self, stands: Tensor, kept: Tokens, rows: Tensor, mark: Tensor, left: tuple[int, ...]) -> None:
        """Carry labels, rows and boundaries over to what is left."""
        visual = self.visual
        if self.labels is not None:
            # a picture's last row predicts the text behind it: that falls to the last one left
            last, now = _last(visual.index, visual.seqlens), _last(stands, kept.seqlens)
            moved = self.labels.index_select(0, last)
            labels = self.labels.index_fill(0, visual.index, IGNORED)
            self.labels = labels.index_copy(0, now, moved).index_select(0, rows)
        asking = visual.asking
        if asking is not None:  # so does a question that ends with a picture
            moved = asking.index_select(0, _last(visual.index, visual.seqlens))
            asking = asking.index_fill(0, visual.index, 0.0).index_copy(0, _last(stands, kept.seqlens), moved)
        self.rows = self.rows.index_select(0, rows)
        self.fewest_dropped += min(before - after for before, after in zip(visual.counts, left, strict=True))
        self.cu_seqlens = boundaries(left, rows.device)[0]
        self.visual = VisualRows(
            index=(mark.cumsum(0) - 1).index_select(0, stands), seqlens=kept.seqlens, owners=visual.owners, counts=left,
            grid=kept.grid, asking=None if asking is None else asking.index_select(0, rows),
            text=None if visual.text is None else visual.text.index_select(0, rows),
        )  # fmt: skip


def _last(rows: Tensor, seqlens: Sequence[int]) -> Tensor:
    """Return the highest row of each image, whatever the order of its tokens."""
    highest = torch.zeros(len(seqlens), dtype=rows.dtype, device=rows.device)
    return highest.scatter_reduce(0, segments(seqlens, rows.device), rows, "amax")


def _counts(visual: VisualRows, seqlens: Sequence[int]) -> tuple[int, ...]:
    """Return the tokens left of each sequence."""
    counts = list(visual.counts)
    for owner, before, after in zip(visual.owners, visual.seqlens, seqlens, strict=True):
        counts[owner] -= before - after
    return tuple(counts)
