"""The two sides of train_step.py: a rank of a trainer, which waits at the end of each step until it is its turn."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from train_step_mix import IGNORE, IMAGE, PAD, PATCH, Case, Sample, Samples, build
from transformers.utils import is_flash_attn_2_available

from fastmllm.data.resolution import Fixed
from fastmllm.hf import patch
from fastmllm.models.mllm import MLLM
from fastmllm.models.packing import Packing
from fastmllm.train.engine import EngineConfig, init_ranks
from fastmllm.train.meters import StepRecord
from fastmllm.train.peaks import own_peak
from fastmllm.train.stages import StageConfig
from fastmllm.train.trainer import Trainer

RATE, CLIP, ZERO = 1e-3, 1.0, 2
BETAS, EPS = (0.9, 0.999), 1e-8  # the Trainer's
BUCKET = EngineConfig().bucket_elements
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Turns:
    """Send what a step took, and wait for the next turn.

    Args:
        pipe: to the process that measures.
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._began = self._cpu = 0.0

    def begin(self) -> None:
        """Wait for the turn; the process ends here when nobody wants another step."""
        if not self._pipe.recv():
            sys.stdout.flush()
            os._exit(0)  # nothing is kept, and DeepSpeed has nothing to say at the end
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def end(self, loss: float, **more: Any) -> None:
        """End a step, and wait for the next turn."""
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        took = {"wall": time.perf_counter() - self._began, "cpu": time.process_time() - self._cpu}
        peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else rss()
        self._pipe.send({"loss": loss, "peak": peak, **took, **more})
        self.begin()


def rss() -> int:
    """Return the most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(provider: str, case: Case, data: Samples, pipe: Connection, environment: Mapping[str, str], log: str) -> None:
    """Be a rank of a side, until `pipe` says that it is enough.

    Args:
        provider: of the case.
        case: what is trained.
        data: of all steps.
        pipe: of `Turns`.
        environment: of this rank.
        log: file that takes what the libraries print.
    """
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    init_ranks()
    turns, model, kept = Turns(pipe), build(case), [data[number] for number in range(len(data))]
    if provider == "fastmllm":
        ours(model, case, kept, turns)
    else:
        theirs(provider, model, case, kept, turns)


def ours(theirs_model: nn.Module, case: Case, data: Sequence[Sample], turns: Turns) -> None:
    """Train as a user of fastmllm does: the checkpoint of transformers, packed samples, roles."""
    with tempfile.TemporaryDirectory() as folder:
        theirs_model.save_pretrained(folder)
        model = MLLM.from_pretrained(folder)
    del theirs_model
    size = int(case.vision["image_size"])
    model.packing = Packing(policy=Fixed(image_size=size, patch_size=PATCH, fit="resize"), image_token=IMAGE)
    steps = len(data) // case.samples
    stage = StageConfig(
        name="train_step", steps=steps, trainable=dict.fromkeys(("connector", "llm", "embeddings"), RATE),
        batch_size=case.batch_size, betas=BETAS, eps=EPS, schedule="constant", clip=CLIP,
    )  # fmt: skip

    def batch(index: int) -> Any:
        chosen = [data[index * case.batch_size + k] for k in range(case.batch_size)]
        return model.pack([_with_pictures(s.ids, s.pictures) for s in chosen],
                          [_with_pictures(s.labels, [IGNORE] * len(s.pictures)) for s in chosen])  # fmt: skip

    def note(record: StepRecord) -> None:
        turns.end(
            record.loss, padding=record.padding, tokens=record.tokens, targets=record.targets,
            model_tflop=record.model_tflop, hardware_tflop=record.hardware_tflop, peak_tflops=own_peak(device, dtype),
        )  # fmt: skip

    device, dtype = torch.device(DEVICE), case.dtype
    engine = EngineConfig(zero_stage=ZERO, dtype=case.dtype, accumulation=case.accumulation)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, stage, engine, batch, folder, on_step=note)
        turns.begin()
        trainer.run()


def _with_pictures(items: Sequence[Any], pictures: Sequence[Any]) -> list[Any]:
    return [*items[:1], *pictures, *items[1:]]


class Collator:
    """Pad samples to the longest, as processors do.

    Args:
        case: whose sizes they have.
        dtype: of the pixels.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.dtype = case, getattr(torch, case.dtype)
        mean, std = transformers.image_utils.OPENAI_CLIP_MEAN, transformers.image_utils.OPENAI_CLIP_STD
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))

    def __call__(self, chosen: Sequence[Sample]) -> dict[str, Tensor]:
        each = self.case.visual_tokens
        ids = [_with_pictures(s.ids, [IMAGE] * each * len(s.pictures)) for s in chosen]
        labels = [_with_pictures(s.labels, [IGNORE] * each * len(s.pictures)) for s in chosen]
        longest = max(map(len, ids))
        batch = {
            "input_ids": torch.tensor([row + [PAD] * (longest - len(row)) for row in ids]),
            "labels": torch.tensor([row + [IGNORE] * (longest - len(row)) for row in labels]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
        }
        if pictures := [p for s in chosen for p in s.pictures]:
            pixels = torch.stack(pictures).permute(0, 3, 1, 2) / 255
            batch["pixel_values"] = ((pixels - self.mean) / self.std).to(self.dtype)
        return batch


def theirs(provider: str, model: Any, case: Case, data: Sequence[Sample], turns: Turns) -> None:
    """Train as transformers' examples do: its Trainer with DeepSpeed, padded batches, the tower frozen."""
    model.model.vision_tower.requires_grad_(False)
    if DEVICE == "cuda" and is_flash_attn_2_available():
        model.set_attn_implementation("flash_attention_2")
    if provider == "Trainer + patch":
        patch(model)
    elif provider == "Trainer + Liger":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model)
    deepspeed = {
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": ZERO, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            folder, use_cpu=DEVICE == "cpu", deepspeed=deepspeed, bf16=case.dtype == "bfloat16",
            per_device_train_batch_size=case.batch_size, gradient_accumulation_steps=case.accumulation,
            max_steps=len(data) // case.samples, learning_rate=RATE, lr_scheduler_type="constant",
            max_grad_norm=CLIP, weight_decay=0.0, adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS,
            train_sampling_strategy="sequential",  # the data are in the sampler's order
            dataloader_num_workers=4 if DEVICE == "cuda" else 0,  # a CPU is busy with the step itself
            remove_unused_columns=False, logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        losses: list[Tensor] = []

        class Stepwise(transformers.Trainer):
            def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
                losses.append(super().training_step(*args, **kwargs).detach())
                return losses[-1]

        class Note(transformers.TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                turns.end(float(torch.stack(losses).sum()))
                losses.clear()

        trainer = Stepwise(model, options, data_collator=Collator(case), train_dataset=data, callbacks=[Note()])
        turns.begin()
        trainer.train()
