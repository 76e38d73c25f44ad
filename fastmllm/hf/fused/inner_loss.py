"""Head and loss in one, of a model whose head belongs to a language model inside of it, with a forward of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastmllm.hf.fused.loss import HeadLoss

# their forward hands on what the head says
PLAIN = frozenset({"OPTForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})


class InnerHeadLoss(HeadLoss):
    """BLIP-2 and InstructBLIP: their forward takes the loss of the logits of a decoder's head."""

    @staticmethod
    def refuses(module: Any) -> str | None:
        if not module.config.use_decoder_only_language_model:
            return "its encoder-decoder computes the loss itself"  # T5
        inner = type(module.language_model).__name__
        if inner not in PLAIN:
            return f"what {inner} does to its logits is not known"  # Granite and Cohere scale them
        return HeadLoss.refuses(module)

    @staticmethod
    def unsupported(module: Any, *args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> str | None:
        labels, input_ids = kwargs.get("labels"), kwargs.get("input_ids")
        if module.training and (len(args) > 1 or (labels is not None and not _paired(labels, input_ids))):
            return "its labels are not those of input_ids, given by name"  # BLIP-2 scores the end of longer texts
        return HeadLoss.unsupported(module, logits_to_keep=logits_to_keep, **kwargs)


def _paired(labels: Tensor, input_ids: Tensor | None) -> bool:
    return input_ids is not None and input_ids.shape == labels.shape
