"""Head and loss in one operator: no logits of ignored rows, never the full logits."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fastmllm.hf.fusion import Fusion, arguments, hooked, outside_autocast
from fastmllm.kernels.linear_cross_entropy import CHUNK, linear_cross_entropy

MOST_SCORED = 2 / 3  # share of rows; measured break-even on a CPU: 0.68 to 0.76
SUM_OF_A_PART = 64  # in scored rows, as measured for 32k and 152k words


class Now(threading.local):
    """What the thread's call asks of a head, so that several threads train one model.

    Attributes:
        model: whose call it is.
        head: of that model.
        asked: labels as they are scored, divisor, ignored label.
    """

    def __init__(self) -> None:
        self.model: Any = None
        self.head: Any = None
        self.asked: tuple[Tensor, Any, int] | None = None


NOW = Now()


class LossHead(Fusion):
    """The output embedding, nn.Linear: asked for a loss it returns that in place of logits.

    The loss is computed by the module that owns the weight, so that ZeRO-3 gathers it, forward and backward.
    """

    op = "linear_cross_entropy"

    @staticmethod
    def forward(module: Any, original: Callable[..., Tensor], hidden: Tensor) -> Tensor:
        if NOW.head is not module or NOW.asked is None:
            return original(module, hidden)
        labels, divisor, ignored = NOW.asked
        loss = outside_autocast(
            linear_cross_entropy, hidden.reshape(-1, hidden.shape[-1]), module.weight,
            labels.to(hidden.device).reshape(-1), ignore_index=ignored,
            divisor=divisor if not isinstance(divisor, Tensor) else divisor.to(hidden.device),
        )  # fmt: skip
        return loss.view(1, 1, 1)  # the rank of logits


class HeadLoss(Fusion):
    """A model for conditional generation that is trained with `labels`: its loss, and None for the logits."""

    op = "linear_cross_entropy"
    reads = ("loss_function",)

    @staticmethod
    def refuses(module: Any) -> str | None:
        head = module.get_output_embeddings()
        if type(head) is not nn.Linear or head.bias is not None:
            return f"its head is {type(head).__name__}, not nn.Linear without bias"
        text = module.config.get_text_config()
        if getattr(text, "final_logit_softcapping", None) is not None:
            return "its logits are capped"
        return None

    @staticmethod
    def companions(module: Any) -> list[tuple[nn.Module, type[Fusion]]]:
        return [(module.get_output_embeddings(), LossHead)]

    @staticmethod
    def unsupported(module: Any, *args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> str | None:
        if not module.training:
            return None  # runs transformers' own code as a matter of course
        head = module.get_output_embeddings()
        if LossHead not in getattr(type(head), "_fastmllm_fusions", ()):
            return "its head has been replaced since"  # LoRA
        if hooked(head) and not hasattr(head.weight, "ds_id") and "_old_forward" not in head.__dict__:
            return "its head carries hooks, which would see a loss"  # ZeRO-3's and accelerate's hand on what they get
        theirs = sys.modules["transformers.loss.loss_utils"].ForCausalLMLoss
        if (loss := module.loss_function) is not theirs:  # by name a wrapper of it would pass, too
            return f"its loss_function is {getattr(loss, '__name__', 'its own')}, not transformers' own"
        return None if isinstance(logits_to_keep, int) and not logits_to_keep else "logits_to_keep asks for logits"

    @staticmethod
    def forward(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        labels = arguments(original, args, kwargs).get("labels") if args else kwargs.get("labels")
        if labels is None or not module.training:
            return original(module, *args, **kwargs)
        ignored, shifted = kwargs.get("ignore_index", -100), kwargs.get("shift_labels")
        shifted = pad(labels, (0, 1), value=ignored)[..., 1:] if shifted is None else shifted
        head = module.get_output_embeddings()
        if not _worth_it(head, shifted, ignored):
            return _without_logits(original(module, *args, **kwargs))
        before = NOW.model, NOW.head, NOW.asked
        NOW.model, NOW.head, NOW.asked = module, head, (shifted, kwargs.get("num_items_in_batch"), ignored)
        try:
            return _without_logits(original(module, *args, **kwargs))
        finally:
            NOW.model, NOW.head, NOW.asked = before

    @staticmethod
    def loss_function(module: Any, original: Callable[..., Any]) -> Any:
        return _loss_of if NOW.model is module else original(module)


def _worth_it(head: Any, labels: Tensor, ignored: int) -> bool:
    """Tell whether the operator is as fast: on a CPU, a head that learns pays a product again for each scored row.

    In half precision its gradient is moreover summed in fp32, once for each part of the rows.
    """
    weight = head.weight
    if weight.device.type != "cpu" or not weight.requires_grad or torch.compiler.is_compiling():
        return True
    scored = int((labels != ignored).sum())
    parts = -(-scored // max(1, CHUNK // head.out_features))
    summed = SUM_OF_A_PART * parts if parts > 1 and weight.dtype != torch.float32 else 0
    return scored + summed <= MOST_SCORED * labels.numel()


def _without_logits(out: Any) -> Any:
    if isinstance(out, tuple):
        return out[:1] + out[2:]
    return type(out)(**{name: value for name, value in out.items() if name != "logits"})


def _loss_of(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
    assert logits.numel() == 1, "the head did not answer with the loss"
    return logits.view(())
