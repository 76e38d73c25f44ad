"""Visual-token compression: N tokens an image become K. One method a file, one interface.

`METHODS` maps names to classes; `compress` is the functional form.
"""

from __future__ import annotations

from typing import Any, overload

from torch import Tensor

from fastmllm.compression.attend import Attend
from fastmllm.compression.bipartite_merge import BipartiteMerge
from fastmllm.compression.budget import Budget
from fastmllm.compression.compressor import Compressor, Evidence, Probe
from fastmllm.compression.conv_reduce import ConvReduce
from fastmllm.compression.dominant_contextual import DominantContextual
from fastmllm.compression.greedy_diverse import GreedyDiverse
from fastmllm.compression.pivot_dedup import PivotDedup
from fastmllm.compression.pixel_shuffle import PixelShuffle
from fastmllm.compression.placement import Placement
from fastmllm.compression.pool import Pool
from fastmllm.compression.temporal_dedup import TemporalDedup
from fastmllm.compression.tokens import Plan, Tokens
from fastmllm.compression.topk import TopK

_KINDS: tuple[type[Compressor], ...] = (
    PixelShuffle,
    Pool,
    ConvReduce,
    Attend,
    TopK,
    BipartiteMerge,
    DominantContextual,
    GreedyDiverse,
    PivotDedup,
    TemporalDedup,
)
METHODS: dict[str, type[Compressor]] = {kind.name: kind for kind in _KINDS}

__all__ = [
    "METHODS",
    "Budget",
    "Compressor",
    "Evidence",
    "Placement",
    "Plan",
    "Probe",
    "Tokens",
    "compress",
    *sorted(k.__name__ for k in METHODS.values()),
]


def make(method: str, keep: Budget, **options: Any) -> Compressor:
    """Build a compressor by name, as a recipe names it.

    Args:
        method: a key of `METHODS`.
        keep: K, a fraction, or one K an image.
        options: of its class.

    Raises:
        ValueError: unknown method, or an option that it does not take.
    """
    if method not in METHODS:
        raise ValueError(f"compress: unknown method {method!r}; known: {', '.join(METHODS)}")
    try:
        return METHODS[method](keep, **options)
    except TypeError as error:
        raise ValueError(f"compress: {method} does not take these options: {error}") from None


@overload
def compress(
    tokens: Tensor,
    method: str | Compressor,
    *,
    keep: Budget | None = None,
    evidence: Evidence | None = None,
    **options: Any,
) -> Tensor: ...
@overload
def compress(
    tokens: Tokens,
    method: str | Compressor,
    *,
    keep: Budget | None = None,
    evidence: Evidence | None = None,
    **options: Any,
) -> Tokens: ...


def compress(
    tokens: Tensor | Tokens, method: str | Compressor, *, keep: Budget | None = None, evidence: Evidence | None = None,
    **options: Any,
) -> Tensor | Tokens:  # fmt: skip
    """Reduce every image's visual tokens to exactly `keep`.

    Args:
        tokens: (I, N, C), a row-major grid where N is a square, or `Tokens` for images of different sizes.
        method: a key of `METHODS`, or a compressor; one with weights of its own must be one.
        keep: K, a fraction 0 < f <= 1, or one K an image; K = N leaves an image as it is. A compressor has its own.
        evidence: attention or scores, where the method judges by them.
        options: of the method's class.

    Returns:
        (I, K, C), or `Tokens`, as given.

    Raises:
        ValueError: unknown method or option, K outside of 1..N, or a K that the method cannot make of this grid.
    """
    if isinstance(method, str):
        if keep is None:
            raise ValueError(f"compress: {method} needs keep, the number or the fraction of tokens that are left")
        method = make(method, keep, **options)
    elif keep is not None or options:
        raise ValueError(f"compress: {method.name} is built already; its settings are its own")
    packed = tokens if isinstance(tokens, Tokens) else Tokens.of(tokens)
    out, _ = method(packed, evidence)
    if isinstance(tokens, Tokens):
        return out
    return tokens if out is packed else out.dense()
