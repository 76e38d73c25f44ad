"""What a caller knows of a call's visual tokens, for compressors that judge by it (CDPruner, the scorer "external")."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmllm.compression import METHODS, Compressor, GreedyDiverse, Tokens
from fastmllm.compression.budget import tokens_to_keep
from fastmllm.hf.compress.media import IMAGE, VIDEO
from fastmllm.hf.compress.seams import KEY
from fastmllm.kernels._triton import accumulator_dtype

if TYPE_CHECKING:
    from fastmllm.hf.compress.state import Compression

Scores = Tensor | Sequence[Tensor]


def judges_by_given(compressor: Compressor) -> bool:
    """Tell whether a method of ours judges by what the caller brings."""
    options = {getattr(compressor, name, None) for name in ("scorer", "relevance")}
    return type(compressor) in METHODS.values() and bool(options & {"given", "external"})


@contextmanager
def relevance(model: nn.Module, images: Scores | None = None, *, videos: Scores | None = None) -> Iterator[None]:
    """Judge visual tokens by given numbers in calls of a patched model, of this thread, inside of the block.

    ```python
    fastmllm.patch(model, compress="CDPruner:64")
    with fastmllm.hf.relevance(model, scores):
        model.generate(**inputs)
    ```

    Args:
        model: patched with a compressor of relevance "given", of scorer "external", or with one of your own, which
            finds them in its `Evidence` under either name.
        images: of the tokens that are compressed, in the order of the images (or of their tiles): (T,), or one tensor
            an image, the higher the more relevant. They stand where the report says: in front of LLaVA's projector one
            a patch, behind Qwen's merger one a merged token. They have no gradient.
        videos: the same of videos.

    Raises:
        ValueError: the model has no compressor that judges by them, or they are not finite, or, when it is called, not
            as many as the tokens.
    """
    states = (m.__dict__[KEY] for m in model.modules() if KEY in m.__dict__)
    state = next((state for state in states if getattr(state, "compressor", None) is not None), None)
    if state is None:
        raise ValueError("relevance: nothing is compressed at the connector of this model: patch(model, compress=...)")
    compressor = state.compressor
    if type(compressor) in METHODS.values() and not judges_by_given(compressor):
        raise ValueError(f"relevance: {compressor.name} does not judge by it: relevance='given' or scorer='external'")
    given = {medium: scores for medium, scores in ((IMAGE, images), (VIDEO, videos)) if scores is not None}
    signed = not isinstance(compressor, GreedyDiverse) or compressor.objective == "dpp"
    for part in (part for scores in given.values() for part in scores):
        if not bool(part.isfinite().all()) or (not signed and bool((part < 0).any())):
            raise ValueError(f"relevance: must be finite{'' if signed else ' and at least 0'} for {compressor.name}")
    before, state.now.given = state.now.given, given
    try:
        yield
    finally:
        state.now.given = before


def scores_of(state: Compression, tokens: Tokens) -> Tensor | None:
    """Return what the caller has given of a call's tokens, (T,) on their device, or None.

    Raises:
        ValueError: the caller has given nothing, or not as much as there are tokens.
    """
    compressor, medium = state.compressor, state.now.medium or IMAGE
    assert compressor is not None
    scores = state.now.given.get(medium)
    if scores is not None:
        return _of_tokens(scores, tokens)
    if judges_by_given(compressor) and tokens_to_keep(compressor.name, compressor.keep, tokens.seqlens) != (
        tokens.seqlens
    ):
        raise ValueError(
            f"compress: {compressor.name} judges by given relevance, and this call's "
            f"{'images' if medium is IMAGE else 'videos'} have none: call the model inside of "
            "`with fastmllm.hf.relevance(model, ...):`"
        )
    return None


def _of_tokens(scores: Any, tokens: Tokens) -> Tensor:
    """Return (T,) on the tokens' device."""
    if not isinstance(scores, Tensor) or scores.dim() == 2:  # one an image
        lengths = tuple(len(part) if part.dim() == 1 else -1 for part in scores)
        fits = lengths == tokens.seqlens
        said = f"tensors of {lengths[:8]} numbers"
    else:
        fits, said = scores.shape == tokens.x.shape[:1], f"a tensor of shape {tuple(scores.shape)}"
    if not fits:
        raise ValueError(
            f"compress: relevance: {said} for {len(tokens.x)} tokens: {len(tokens.seqlens)} images, tiles or videos "
            f"of {tokens.seqlens[:8]}"
        )
    whole = scores.flatten() if isinstance(scores, Tensor) else torch.cat(list(scores))
    return whole.detach().to(tokens.x.device, accumulator_dtype(tokens.x.dtype))
