"""Gradients of a loss over all pairs of a step, for micro-batches that go backward one after the other (GradCache).

A contrastive loss does not fall apart into micro-batches: each pair is compared with all others. So features are made
without a graph first; the loss of all of them and its gradients with respect to them are computed; then each
micro-batch makes its features again, with a graph, and takes its part of these gradients from there. Memory is that of
one micro-batch and of the features, the gradient that of the whole step at once.

Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, arXiv 2101.06983.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CachedGradients:
    """What one micro-batch learns of the loss of its step.

    Args:
        loss: mean over this rank's pairs of the step, a scalar.
        features: gradient of it, times the micro-batches, for each kind of feature of this micro-batch.
        parameters: gradient of it for the parameters that the loss itself has.
    """

    loss: Tensor
    features: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]

    def apply(self, features: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
        """Return the loss, with these gradients; the mean over the step's micro-batches has the loss's own.

        Args:
            features: of this micro-batch, made again, in the order that they were compared in.
            parameters: of the loss.
        """
        pairs = [*zip(features, self.features, strict=True), *zip(parameters, self.parameters, strict=True)]
        linear = torch.stack([(value * gradient.to(value)).sum().to(self.loss) for value, gradient in pairs]).sum()
        return self.loss + linear - linear.detach()


def cache_gradients(
    loss: Callable[..., Tensor], micro_batches: Sequence[Sequence[Tensor]], parameters: Sequence[Tensor]
) -> list[CachedGradients]:
    """Compare all pairs of this rank's micro-batches, with those of other ranks where the loss gathers them.

    Args:
        loss: (features of each kind, rows of all micro-batches, then the parameters) -> mean over this rank's pairs.
        micro_batches: features of each kind, (n, ...), n the same in all.
        parameters: that the loss itself has.

    Returns:
        What each micro-batch learns.
    """
    with torch.enable_grad():
        leaves = [torch.cat(kind).detach().requires_grad_() for kind in zip(*micro_batches, strict=True)]
        values = [parameter.detach().clone().requires_grad_() for parameter in parameters]
        found = loss(*leaves, *values)
        gradients = torch.autograd.grad(found, [*leaves, *values])
    number = len(micro_batches)
    parts = zip(*(gradient.mul(number).chunk(number) for gradient in gradients[: len(leaves)]), strict=True)
    return [CachedGradients(found.detach(), part, gradients[len(leaves) :]) for part in parts]
