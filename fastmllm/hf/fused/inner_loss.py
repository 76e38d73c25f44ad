"""Head and loss in one, of a model whose head belongs to a language model inside of it, with a forward of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastmllm.hf.fused.loss import HeadLoss


class InnerHeadLoss(HeadLoss):
    """BLIP-2 and InstructBLIP: their forward takes the loss of the logits of a decoder's head."""

    @staticmethod
    def refuses(module: Any) -> str | None:
        if not module.config.use_decoder_only_language_model:
            return "its encoder-decoder computes the loss itself"  # T5
        return HeadLoss.refuses(module)

    @staticmethod
    def unsupported(
        module: Any, pixel_values: Any, *args: Any, input_ids: Tensor | None = None, labels: Tensor | None = None,
        **kwargs: Any,
    ) -> str | None:  # fmt: skip
        if module.training and (args or input_ids is None or labels is None or labels.shape != input_ids.shape):
            return "its labels are not those of input_ids, given by name"  # BLIP-2 scores the end of longer texts
        return HeadLoss.unsupported(module, **kwargs)
