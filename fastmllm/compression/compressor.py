"""The interface of all compressors: tokens and evidence in, tokens and a plan out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from fastmllm.compression.budget import Budget, tokens_to_keep
from fastmllm.compression.tokens import Plan, Tokens, boundaries
from fastmllm.kernels._triton import accumulator_dtype
from fastmllm.kernels.attention_scores import attention_scores

Position = Literal["keep", "renumber", "calibrate"]
Mode = Literal["clean", "faithful"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """Queries and keys of one attention layer, read while it ran with flash: what scores are made of.

    Args:
        q: (T', H, D) as that attention took them.
        k: (N', Hkv, D).
        lse: (H, T') its log-sum-exp.
        cu_seqlens: (S + 1,) int32 of its segments.
        max_seqlen: its longest segment of keys, host.
        columns: (T,) int64 rows of `k` that the visual tokens are, or None: all. (T, M) where a connector has made one
            token of M rows: what is read of it is the mean over its rows, of scores, keys and norms alike.
        causal: as in that attention.
        softmax_scale: as in that attention.
        cls_token: whether the first row of each segment is a class token.
        asking: (T',) weights of the rows that count as the last ones; None: each segment's last row.
        text: (T',) weights of the rows of text, for scores by text.
        key_bias: (N',) as in that attention.
        cu_seqlens_k: (S + 1,) int32 of the segments in `k`, behind a cache; None: as `cu_seqlens`.
    """

    q: Tensor
    k: Tensor
    lse: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    columns: Tensor | None = None
    causal: bool = False
    softmax_scale: float | None = None
    cls_token: bool = False
    asking: Tensor | None = None
    text: Tensor | None = None
    key_bias: Tensor | None = None
    cu_seqlens_k: Tensor | None = None

    def received(self, rows: str = "all", reduce: str = "mean", weight: Tensor | None = None) -> Tensor:
        """Return the attention (T,) fp32 that each visual token receives (`attention_scores`).

        Args:
            rows: from "all" rows, the "first" or the "last" one of each segment.
            reduce: over the heads.
            weight: (T',) of the rows, whose sum it then is; None: their mean.

        Raises:
            ValueError: the first row's attention, where it is no class token.
        """
        if rows == "first" and not self.cls_token:
            raise ValueError(
                "Probe: there is no class token, so the first row's attention says nothing: take the scorer "
                "'received', or in a language model 'last_row' (Probe(cls_token=True) where there is one)"
            )
        weight = None if weight is None else weight.to(self.lse.dtype)
        scores = attention_scores(
            self.q, self.k, self.lse, self.cu_seqlens, self.cu_seqlens_k, self.max_seqlen, self.causal,
            self.softmax_scale, reduce=reduce, rows=rows, row_weight=weight, key_bias=self.key_bias,
        )  # fmt: skip
        return self.of_tokens(scores)

    def keys(self) -> Tensor:
        """Return the keys of the visual tokens, the mean over heads: (T, D) in the dtype of k."""
        return self.of_tokens(self.k.float().mean(1)).to(self.k.dtype)

    def key_norms(self) -> Tensor:
        """Return the L1 norm (T,) of each visual token's key, over all heads, fp32 or fp64."""
        norms = self.k.flatten(1).norm(p=1, dim=1, dtype=accumulator_dtype(self.k.dtype))
        return self.of_tokens(norms)

    def of_tokens(self, rows: Tensor) -> Tensor:
        """Return (T, ...) of the visual tokens, of a tensor (N', ...) of the rows of `k`."""
        if self.columns is None:
            return rows
        taken = rows.index_select(0, self.columns.flatten())
        return taken if self.columns.dim() == 1 else taken.unflatten(0, self.columns.shape).mean(1)


@dataclass(slots=True)
class Watch:
    """Where a layer that is asked to leaves its attention; an object, as ZeRO-3's hooks copy lists on their way in."""

    probe: Probe | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What a compressor may judge tokens by, beside their features. Nothing of it has a gradient.

    Args:
        probe: of the attention layer that the compressor names in `layer`.
        relevance: (T,) at least 0, e.g. similarity with the prompt.
        scores: (T,) made elsewhere, for the scorer "external".
        seed: of the scorer "random".
    """

    probe: Probe | None = None
    relevance: Tensor | None = None
    scores: Tensor | None = None
    seed: int = 0


class Compressor(nn.Module):
    """Reduce every image's visual tokens to exactly K.

    Args:
        keep: K, a fraction, or one K an image.
        position: of a kept token: "keep" its own, "renumber" 0..K-1, or "calibrate": its own, and its size says how
            much of the image stands behind it (all of it behind all of them), for the attention to add the logarithm.
        mode: "clean", or "faithful": as the published code computes it, where that differs.
    """

    name: ClassVar[str]
    faithful_to: ClassVar[str | None] = None  # what the faithful mode reproduces; None: there is no other than clean

    def __init__(self, keep: Budget, *, position: Position = "keep", mode: Mode = "clean") -> None:
        super().__init__()
        if position not in get_args(Position):
            raise ValueError(f"{self.name}: position {position!r} is not one of {', '.join(get_args(Position))}")
        if mode not in get_args(Mode) or (mode == "faithful" and self.faithful_to is None):
            known = "clean" if self.faithful_to is None else "clean, faithful"
            raise ValueError(f"{self.name}: mode {mode!r} is not one of {known}")
        self.keep, self.position, self.mode = keep, position, mode

    @property
    def layer(self) -> int | None:
        """The layer whose attention it needs a probe of, -1 the last one; None: none."""
        return None

    def forward(
        self, tokens: Tokens, evidence: Evidence | None = None, budgets: tuple[int, ...] | None = None
    ) -> tuple[Tokens, Plan | None]:
        """Compress.

        Args:
            tokens: of all images.
            evidence: what the scores are made of.
            budgets: K of each image, instead of `keep`.

        Returns:
            The tokens left, and where they came from; None where each is a mixture of all or nothing was done.

        Raises:
            ValueError: a budget that does not fit the images, or evidence that is missing.
        """
        budgets = tokens_to_keep(self.name, self.keep if budgets is None else budgets, tokens.seqlens)
        if budgets == tokens.seqlens:
            return tokens, None
        out, plan = self.reduce(tokens, evidence or Evidence(), budgets)
        if out.seqlens != budgets:
            raise AssertionError(f"{self.name}: kept {out.seqlens}, asked for {budgets}")
        return self._placed(tokens, out), plan

    def reduce(self, tokens: Tokens, evidence: Evidence, budgets: tuple[int, ...]) -> tuple[Tokens, Plan | None]:
        """Do it; where K is the image's own number of tokens, the image stays as it is."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"keep={self.keep}, position={self.position}, mode={self.mode}"

    def _probe(self, evidence: Evidence) -> Probe:
        if evidence.probe is None:
            raise ValueError(
                f"{self.name}: needs the attention of a layer; give Evidence(probe=...), or place it in a model that "
                "has attention"
            )
        return evidence.probe

    def _placed(self, before: Tokens, after: Tokens) -> Tokens:
        if self.position == "renumber":
            index = boundaries(after.seqlens, after.pos.device)[1]
            return replace(after, pos=index[:, None].expand(-1, after.pos.shape[1]))
        if self.position == "calibrate":
            return replace(after, size=_whole(before, after))
        return after


def _whole(before: Tokens, after: Tokens) -> Tensor:
    """Return the sizes of the tokens left, scaled so that each image weighs what it did."""
    count = len(before.seqlens)
    full, left = (
        torch.zeros(count, device=t.x.device).index_add_(0, t.owners(), t.mass().float()) for t in (before, after)
    )
    return after.mass() * (full / left).index_select(0, after.owners())
