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

from fastmllm.compression.compressor import Compressor, Evidence, Probe
from fastmllm.compression.tokens import Grid, Tokens, boundaries, segments

IGNORED = -100  # a label that is no target


@dataclass(frozen=True, kw_only=True, slots=True)
class VisualRows:
    """Where the visual tokens of a packed batch stand.

    Args:
        index: (V,) int64 rows of the packed text, image after image, each in its order.
        seqlens: tokens of each image, host.
        owners: the sequence of each image, host, ascending.
        counts: tokens of each sequence, host.
        grid: of each image, where it still is one.
        prompt: (S,) int32 row behind the last token of each prompt; None: the sequence is one. What looks at a prompt
            in training must not look at its answer.
    """

    index: Tensor
    seqlens: tuple[int, ...]
    owners: tuple[int, ...]
    counts: tuple[int, ...]
    grid: tuple[Grid, ...] | None = None
    prompt: Tensor | None = None

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
            labels: (T,) already shifted, or None: all of it is a prompt.
            device: of the model.
            grid: of each image, if it is one.
        """
        bounds = cu_seqlens.tolist()
        starts = index[torch.tensor([0, *seqlens[:-1]]).cumsum(0)].tolist()
        prompt = list(bounds[1:])
        if labels is not None:
            targets = (labels != IGNORED).nonzero().view(-1).tolist()
            for row in reversed(targets):  # the first of each sequence is set last
                prompt[bisect_right(bounds, row) - 1] = row + 1
        return cls(
            index=index.to(device, non_blocking=True), seqlens=tuple(seqlens),
            owners=tuple(bisect_right(bounds, start) - 1 for start in starts),
            counts=tuple(b - a for a, b in pairwise(bounds)), grid=grid,
            prompt=torch.tensor(prompt, dtype=torch.int32).to(device, non_blocking=True),
        )  # fmt: skip


class Reduction:
    """Reduce the visual tokens of one batch on its way through the layers of a language model.

    Args:
        stages: (layer, compressor): what runs in front of that decoder layer, 0 the first one; ascending.
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
        self.stages, self.visual, self.labels = dict(stages), visual, labels
        device = visual.index.device
        self.rows = torch.arange(sum(visual.counts), device=device)
        self.cu_seqlens = boundaries(visual.counts, device)[0]
        self.key_bias: Tensor | None = None  # (T',) fp32: log of what each row stands for
        self.kept: Tensor | None = None  # (K,) int64 which of the last stage's visual tokens are left, None: all
        self.fewest_dropped = 0  # tokens that every sequence has lost
        self.positions_taken = visual.counts  # positions that each sequence takes, host

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
            probe: the attention of the layer in front, over all rows.

        Returns:
            Hidden states (T', D), position ids and the rows of `x` that are left, (T',) int64.
        """
        visual, compressor = self.visual, self.stages[layer]
        if probe is not None:
            probe = replace(probe, columns=visual.index, prompt=visual.prompt, text=self._text())
        size = None if self.key_bias is None else self.key_bias.exp().index_select(0, visual.index)
        pos = position_ids.reshape(-1, len(x)).index_select(1, visual.index).t()
        tokens = replace(Tokens.of(x.index_select(0, visual.index), [(n, 1) for n in visual.seqlens], pos), size=size)
        tokens = replace(tokens, grid=visual.grid)
        kept, plan = compressor(tokens, Evidence(probe=probe))
        if plan is None and kept is not tokens:
            raise ValueError(
                f"Reduction: {compressor.name} mixes all tokens; it has no place inside of a language model"
            )
        self.kept = None if plan is None else plan.keep
        if plan is None:
            return x, position_ids, torch.arange(len(x), device=x.device)
        stands = visual.index.index_select(0, plan.keep)  # rows of x
        mark = torch.ones(len(x), dtype=torch.bool, device=x.device)
        mark.index_fill_(0, visual.index, False).index_fill_(0, stands, True)
        left = _counts(visual, kept.seqlens)
        rows = torch.nonzero_static(mark, size=sum(left)).view(-1)
        if plan.assign is not None:  # merged: they stand at their row with another value
            x = x.index_copy(0, stands, kept.x.to(x.dtype))
        if kept.size is not None:
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            bias = x.new_zeros(len(x), dtype=wide) if self.key_bias is None else self.key_bias
            self.key_bias = bias.index_copy(0, stands, kept.size.detach().to(wide).log()).index_select(0, rows)
        self._follow(stands, kept.seqlens, rows, mark, left)
        if compressor.position == "renumber":
            self.positions_taken = left
            return x.index_select(0, rows), boundaries(left, x.device)[1], rows
        return x.index_select(0, rows), position_ids.index_select(-1, rows), rows

    def _text(self) -> tuple[Tensor, Tensor]:
        """Return the rows of each sequence behind its last image and up to the end of its prompt."""
        first = torch.zeros(len(self.visual.counts), dtype=torch.int64, device=self.rows.device)
        image = segments(self.visual.seqlens, self.rows.device)
        owner = torch.tensor(self.visual.owners).to(self.rows.device, non_blocking=True)
        first.scatter_reduce_(0, owner.index_select(0, image), self.visual.index + 1, "amax")
        stop = self.cu_seqlens[1:] if self.visual.prompt is None else self.visual.prompt
        return torch.maximum(first.int(), self.cu_seqlens[:-1]), stop

    def _follow(
        self, stands: Tensor, seqlens: tuple[int, ...], rows: Tensor, mark: Tensor, left: tuple[int, ...]
    ) -> None:
        """Carry labels, rows and boundaries over to what is left."""
        visual, device = self.visual, rows.device
        if self.labels is not None:
            # a picture's last row predicts the text behind it: that falls to the last one left
            last, now = (boundaries(n, device)[0][1:].long() - 1 for n in (visual.seqlens, seqlens))
            moved = self.labels.index_select(0, visual.index.index_select(0, last))
            labels = self.labels.index_fill(0, visual.index, IGNORED)
            self.labels = labels.index_copy(0, stands.index_select(0, now), moved).index_select(0, rows)
        place = mark.cumsum(0) - 1
        prompt = visual.prompt
        if prompt is not None:
            prompt = (place.index_select(0, prompt.long() - 1) + 1).int()
        self.rows = self.rows.index_select(0, rows)
        self.fewest_dropped += min(before - after for before, after in zip(visual.counts, left, strict=True))
        self.cu_seqlens = boundaries(left, device)[0]
        self.visual = VisualRows(
            index=place.index_select(0, stands), seqlens=seqlens, owners=visual.owners, counts=left, prompt=prompt
        )


def _counts(visual: VisualRows, seqlens: Sequence[int]) -> tuple[int, ...]:
    """Return the tokens left of each sequence."""
    counts = list(visual.counts)
    for owner, before, after in zip(visual.owners, visual.seqlens, seqlens, strict=True):
        counts[owner] -= before - after
    return tuple(counts)
