"""Contrastive losses of image and text towers, on one rank or spread over many.

Spread over ranks, each computes the rows of its own images and texts against the features of all ranks, n x N logits
instead of N x N, and gradients flow back to the ranks that the features came from. Every rank must bring the same
number of pairs. Average gradients over the ranks (what DDP and ZeRO do): they are then those of one process that holds
the whole batch; so is the mean of the losses.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastmllm.kernels.linear_cross_entropy import linear_cross_entropy
from fastmllm.modules.cached_gradients import CachedGradients
from fastmllm.modules.ranks import gather, place


def _check(name: str, image: Tensor, text: Tensor) -> None:
    if image.dim() != 2 or image.shape != text.shape or not image.shape[0] or image.dtype != text.dtype:
        raise ValueError(
            f"{name}: image {tuple(image.shape)} {image.dtype} and text {tuple(text.shape)} {text.dtype} must be "
            "(n, D) of the same pairs, at least one, in one dtype"
        )


class PairLoss(nn.Module):
    """A loss that compares each pair of an image and a text with all others."""

    def scales(self) -> tuple[Tensor, ...]:
        """Return its parameters."""
        raise NotImplementedError

    def score(self, image: Tensor, text: Tensor, *scales: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """Return the mean loss of this rank's pairs, under other values of the parameters too."""
        raise NotImplementedError

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        group: dist.ProcessGroup | None = None,
        cached: CachedGradients | None = None,
    ) -> Tensor:
        """Return the mean loss of this rank's pairs, a scalar.

        Args:
            image: (n, D) features, normalised here.
            text: (n, D), row i belongs to image i.
            group: of ranks; None is all of them, if there are any.
            cached: of `cache_gradients`, where these features are one of several micro-batches of a step.

        Raises:
            ValueError: shapes or dtypes do not fit.
        """
        _check(type(self).__name__, image, text)
        if cached is not None:
            return cached.apply((image, text), self.scales())
        return self.score(image, text, *self.scales(), group=group)


class ClipLoss(PairLoss):
    """Softmax loss: every image finds its text among all texts, every text its image; the mean of both.

    The logits are never whole in memory (`linear_cross_entropy`). The scale is `exp(logit_scale)`, learned, and lies in
    1..100, as CLIP's: what is used is bounded, not the parameter, whose master copy an optimizer may keep elsewhere.

    Args:
        temperature: the scale starts at 1 / temperature.

    Equal to open_clip's ClipLoss with `local_loss` and `gather_with_grad` on normalised features (CLIP, arXiv
    2103.00020).
    """

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))

    def scales(self) -> tuple[Tensor, ...]:
        """Return the log of the scale."""
        return (self.logit_scale,)

    def score(self, image: Tensor, text: Tensor, *scales: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """As `PairLoss.score`."""
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        n, scale = image.shape[0], _Bounded.apply(scales[0], 0.0, math.log(100.0)).exp().to(image.dtype)
        images, texts = gather(image, group), gather(text, group)
        start = place(group)[0] * n
        labels = torch.arange(start, start + n, device=image.device)
        find_text = linear_cross_entropy(scale * image, texts, labels, num_targets=n)
        find_image = linear_cross_entropy(scale * text, images, labels, num_targets=n)
        return (find_text + find_image) / 2


class _Bounded(torch.autograd.Function):
    """Clamp; the gradient passes inside of the bounds, and outside where it leads back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,), (low, high), grad = ctx.saved_tensors, ctx.bounds, grads[0]
        outward = ((x >= high) & (grad < 0)) | ((x <= low) & (grad > 0))
        return torch.where(outward, 0, grad), None, None


class SiglipLoss(PairLoss):
    """Sigmoid loss: each pair of an image and a text is a yes/no question; summed over texts, mean over images.

    Args:
        temperature: the scale starts at 1 / temperature.
        bias: where the logits' bias starts.

    Equal to open_clip's SigLipLoss on normalised features (SigLIP, arXiv 2303.15343).
    """

    def __init__(self, temperature: float = 0.1, bias: float = -10.0) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.logit_bias = nn.Parameter(torch.tensor(float(bias)))

    def scales(self) -> tuple[Tensor, ...]:
        """Return the log of the scale, and the bias."""
        return self.logit_scale, self.logit_bias

    def score(self, image: Tensor, text: Tensor, *scales: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """As `PairLoss.score`."""
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        n, (log_scale, bias) = image.shape[0], scales
        texts, start = gather(text, group), place(group)[0] * n
        logits = (image @ texts.t()).to(bias.dtype) * log_scale.exp() + bias  # (n, N)
        column = torch.arange(texts.shape[0], device=image.device)
        pair = column == column[start : start + n, None]
        return F.softplus(torch.where(pair, -logits, logits)).sum() / n  # -log sigmoid(z x) = softplus(-z x)
