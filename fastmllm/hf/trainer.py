"""`patch` in transformers' Trainer and in TRL's trainers: `Trainer(..., callbacks=[FastMLLMCallback])`."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from fastmllm.hf.compress import check_learns
from fastmllm.hf.fusion import is_fused
from fastmllm.hf.patch import patch, unpatch
from fastmllm.hf.report import Report


class FastMLLMCallback(TrainerCallback):
    """Patch the model when training begins and give it back when it ends, so that what is saved then is plain.

    A model that is patched already is left as it is, and stays patched; so does one whose training ends by an error.
    In training the model returns its loss without logits: a Trainer that reads `outputs.logits` there needs
    `ops=` without "linear_cross_entropy".

    A compressor with weights (`compress=`) stays outside of the model's parameters, so that a Trainer neither trains
    nor saves it by itself: give `Trainer(optimizers=(optimizer, scheduler))` an optimizer that has its parameters too,
    and save its `state_dict()`.

    Args:
        options: of `patch`; none are needed, so the class itself may be given to a Trainer.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.report: Report | None = None  # of the last training

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Patch.

        Raises:
            ValueError: the model's compressor has weights that the Trainer's optimizer does not have.
        """
        if any(is_fused(module) for module in model.modules()):
            check_learns(model, kwargs.get("optimizer"))
            return
        self.report = patch(model, **self.options)
        if state.is_world_process_zero:
            Console(width=None if sys.stdout.isatty() else 160).print(self.report)
        check_learns(model, kwargs.get("optimizer"))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.report is not None:
            unpatch(model)
