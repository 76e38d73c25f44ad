"""The language-model head, which is asked for logits or, in training, for a loss without them."""

from __future__ import annotations

from torch import Tensor, nn

from fastmllm.kernels.linear_cross_entropy import linear_cross_entropy, sequence_log_probs


class LMHead(nn.Linear):
    """Project on the vocabulary: nn.Linear without bias that can also be scored in place.

    The loss is computed by the module that owns the weight, so that ZeRO-3 gathers it.

    Args:
        width: of the hidden states.
        vocab_size: rows of the weight.
    """

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__(width, vocab_size, bias=False)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        num_targets: int | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        reduction: str = "sum",
    ) -> Tensor:
        """Return logits (T, V); with labels, the fp32 sum of the cross-entropy over the rows that are not -100.

        Args:
            hidden: (T, D).
            labels: (T,) int64, aligned with the rows, or None.
            num_targets: labels that are not -100, a host number that spares a synchronisation.
            cu_seqlens: (S + 1,) boundaries; then it is the log-probability of each sequence's labels, (S,) fp32.
            reduction: "none" for the cross-entropy of each row, (T,) fp32, 0 where the label is -100.
        """
        if labels is None:
            return super().forward(hidden)
        if cu_seqlens is not None:
            return sequence_log_probs(hidden, self.weight, labels, cu_seqlens, num_targets=num_targets)
        return linear_cross_entropy(hidden, self.weight, labels, reduction=reduction, num_targets=num_targets)
