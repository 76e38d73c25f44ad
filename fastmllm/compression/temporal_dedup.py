"""Drop what a video's frames repeat.

Efficient Video Sampling (EVS, arXiv 2510.14624, as in vLLM), and the temporal merging of DyCoke (arXiv 2411.15024).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastmllm.compression.budget import Budget
from fastmllm.compression.compressor import Compressor, Evidence, Mode, Position
from fastmllm.compression.ragged import repeat
from fastmllm.compression.selection import best, by_score, select, take
from fastmllm.compression.tokens import Grid, Plan, Tokens
from fastmllm.kernels._triton import accumulator_dtype

WHOLE = -1  # a frame that is compared with none


class TemporalDedup(Compressor):
    """Keep the K tokens of every video that differ most, by cosine, from the same place of an earlier frame.

    "previous" is EVS: each frame is compared with the one before it, the first one is kept, and the K tokens that
    changed most are taken from the whole video. Its faithful mode is the clean one.

    "groups" is DyCoke's: of every four frames the first is kept, the second and the third are compared with it and the
    fourth with the third; all these frames keep the same number of tokens (one more in the first of them where K asks
    for it). The faithful mode does as the published code: the third frame of the last group is kept whole, the last
    frame of an odd number is lost, and a frame's tokens are in the order of what changed most; there they stay in
    theirs.

    Args:
        keep: K, a fraction, or one K a video; at least as much as the frames that are kept whole.
        compare: "previous" or "groups".
        position: see `Compressor`.
        mode: "clean" or "faithful".

    Raises:
        ValueError: an unknown comparison; when called: no grid, or a K that the frames kept whole do not leave room
            for. A picture is a video of one frame: all of it is kept.
    """

    name = "temporal_dedup"
    faithful_to = "EVS (arXiv 2510.14624) by previous, DyCoke TTM (arXiv 2411.15024) by groups"

    def __init__(
        self, keep: Budget, *, compare: Literal["previous", "groups"] = "previous", position: Position = "keep",
        mode: Mode = "clean",
    ) -> None:  # fmt: skip
        super().__init__(keep, position=position, mode=mode)
        if compare not in ("previous", "groups"):
            raise ValueError(f"temporal_dedup: compare {compare!r} is not one of previous, groups")
        self.compare = compare

    def reduce(self, tokens: Tokens, evidence: Evidence, budgets: tuple[int, ...]) -> tuple[Tokens, Plan]:
        if tokens.grid is None:
            raise ValueError("temporal_dedup: needs the frames of each video: Tokens.of(x, grids=[(t, h, w), ...])")
        plans = [self._frames(grid, k, i) for i, (grid, k) in enumerate(zip(tokens.grid, budgets, strict=True))]
        scores = self._changes(tokens, [before for before, _ in plans])
        if self.compare == "previous":
            return select(tokens, scores, budgets)
        lengths = tuple(h * w for t, h, w in tokens.grid for _ in range(t))
        quotas = tuple(quota for _, frames in plans for quota in frames)
        keep = best(tokens, scores, quotas, lengths)
        if self.mode == "faithful":
            frame = repeat(range(len(quotas)), quotas, keep.device)
            keep = keep.index_select(0, by_score(scores.index_select(0, keep), frame))
        return take(tokens, keep, budgets)

    def _frames(self, grid: Grid, keep: int, video: int) -> tuple[list[int], list[int]]:
        """Return of each frame the one that it is compared with, or WHOLE, and how many tokens it keeps."""
        frames, each = grid[0], grid[1] * grid[2]
        if keep == frames * each:
            return [WHOLE] * frames, [each] * frames
        if self.compare == "previous":
            before, lost = list(range(WHOLE, frames - 1)), 0  # the first one's is WHOLE
        else:
            before = [(WHOLE, t - 1, t - 2, t - 1)[t % 4] for t in range(frames)]
            lost = frames % 2 if self.mode == "faithful" else 0
            if self.mode == "faithful":
                before = [WHOLE if t % 4 == 2 and t - 2 >= frames - 4 else b for t, b in enumerate(before)]
        rests = [b != WHOLE for b in before[: frames - lost]]
        least, most = each * rests.count(False), each * len(rests)
        if not least <= keep <= most:
            raise ValueError(
                f"temporal_dedup: keep {keep} of video {video} must lie in {least}..{most}: {rests.count(False)} of "
                f"its {frames} frames, of {each} tokens, stay whole"
            )
        share, more = divmod(keep - least, sum(rests) or 1)
        quotas = [share + (sum(rests[:t]) < more) if rest else each for t, rest in enumerate(rests)]
        return before, quotas + [0] * lost

    def _changes(self, tokens: Tokens, before: list[list[int]]) -> Tensor:
        """Return how much each token differs from the one that it is compared with; most where it is with none."""
        index, whole, start = [], [], 0
        for (_, h, w), n, frames in zip(tokens.grid or (), tokens.seqlens, before, strict=True):
            others = torch.tensor(frames)[:, None]
            index.append((others.clamp(min=0) * h * w + torch.arange(h * w)).flatten() + start)
            whole.append((others == WHOLE).expand(-1, h * w).flatten())
            start += n
        to, alone = (torch.cat(t).to(tokens.x.device, non_blocking=True) for t in (index, whole))
        x = tokens.x.detach()
        x = x.to(accumulator_dtype(x.dtype))
        norm = x.norm(dim=1).clamp(min=1e-8)
        # F.cosine_similarity would write both sides normalised first
        areas = {h * w for _, h, w in tokens.grid or ()}
        if self.compare == "previous" and len(areas) == 1:  # a frame's tokens lie one area behind: nothing is gathered
            area = areas.pop()
            cosine = torch.ones_like(norm)
            cosine[area:] = (x[area:] * x[:-area]).sum(1) / (norm[area:] * norm[:-area])
        else:
            cosine = (x * x.index_select(0, to)).sum(1) / (norm * norm.index_select(0, to))
        change = 1 - cosine if self.compare == "previous" else -cosine
        return change.masked_fill(alone, torch.inf)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, compare={self.compare}"
