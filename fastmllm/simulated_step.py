"""One training step without weights: a recipe's model on the meta device runs forward and backward, and is watched.

What autograd would keep, recompute and multiply is then counted, not guessed, for any composition.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fastmllm.bench.meters import LiveBytes
from fastmllm.data.packing import Batch
from fastmllm.kernels.linear_cross_entropy import GRADIENT_CHUNK
from fastmllm.models.inputs import IGNORE, Inputs
from fastmllm.models.meta_flops import meta_flop_formulas
from fastmllm.models.mllm import MLLM
from fastmllm.models.recompute import recomputing
from fastmllm.models.vlm import IMAGE_TOKEN_ID, VLM


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What a micro-batch is made of: equal samples.

    Args:
        samples: of the micro-batch.
        text_tokens: of a sample, all of them scored.
        images: of a sample.
        image_size: side in pixels of an image, before a published model's resolution policy takes it.
        visual_tokens: that an image keeps, of a model whose recipe says so (`VLM`).
    """

    samples: int
    text_tokens: int = 256
    images: int = 1
    image_size: int = 672
    visual_tokens: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.text_tokens < 2 or self.images < 0 or self.image_size < 1:
            raise ValueError(f"plan: a micro-batch needs samples of 2 or more text tokens, got {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What a micro-batch costs a rank.

    Args:
        activations: most bytes of tensors alive at once in forward and backward, beside parameters and gradients.
        flops: of both passes, recomputation included.
        tokens: rows that the language model sees.
        visual_tokens: of them, or of what its layers look at across.
        backward_elements: of parameters whose modules lie in the way of gradients.
    """

    activations: int
    flops: int
    tokens: int
    visual_tokens: int
    backward_elements: int


def batch_of(model: VLM | MLLM, load: Load) -> Batch | Inputs:
    """Make a micro-batch of a load; blank pictures."""
    if isinstance(model, MLLM):
        shape = load.image_size, load.image_size, 3
        samples: list[list[Any]] = [  # a picture of its own for each: one that several show is encoded once
            [*(np.zeros(shape, np.uint8) for _ in range(load.images)), *[1] * load.text_tokens]
            for _ in range(load.samples)
        ]
        labels = [IGNORE] * load.images + [1] * load.text_tokens
        return model.pack(samples, [labels] * load.samples)
    side, places = load.image_size, load.images * load.visual_tokens
    length, images = places + load.text_tokens, load.samples * load.images
    labels = ([IGNORE] * places + [1] * load.text_tokens) * load.samples
    starts = length * torch.arange(load.samples)
    return Batch(
        input_ids=torch.tensor(([IMAGE_TOKEN_ID] * places + [1] * load.text_tokens) * load.samples),
        labels=torch.tensor(labels),
        position_ids=torch.arange(length).repeat(load.samples),
        cu_seqlens=(length * torch.arange(load.samples + 1)).int(),
        max_seqlen=length,
        image_index=(starts[:, None] + torch.arange(places)).flatten(),
        pixels=torch.empty(images, side, side, 3, dtype=torch.uint8, device="meta") if images else None,
        num_targets=load.samples * load.text_tokens,
        ids=[],
        image_paths=[str(k) for k in range(images)],
        shown=None,
    )


def simulate(model: VLM | MLLM, load: Load, recomputed: Collection[nn.Module] = ()) -> Step:
    """Run a micro-batch forward and backward without numbers.

    Args:
        model: on the meta device; what learns is set, and modes too.
        load: the micro-batch.
        recomputed: modules that keep their input only (gradient checkpointing).

    Raises:
        ValueError: the model refuses the load, or nothing learns.
    """
    batch = batch_of(model, load)
    used: set[nn.Module] = set()
    learning = [param for param in model.parameters() if param.requires_grad]
    hooks = [param.register_post_accumulate_grad_hook(_drop) for param in learning]
    hooks += [module.register_forward_hook(partial(_note, used)) for module in model.modules()]
    try:
        with recomputing(recomputed):
            with LiveBytes() as live:
                model(batch).backward()
            # in a run of its own: it follows modules, and with that keeps what is recomputed until it ends
            with FlopCounterMode(display=False, custom_mapping=meta_flop_formulas()) as counter:
                model(batch).backward()
    finally:
        for hook in hooks:
            hook.remove()
    reached = {param for module in used for param in module.parameters(recurse=False)}
    visual = batch.image_index.numel() if isinstance(batch, Batch) else _visual(batch)
    table, targets = model.language.head_weight, load.samples * load.text_tokens
    # inside of the loss, unseen from outside: a tile of logits, and the gradient of the hidden states in fp32
    loss = min(GRADIENT_CHUNK, targets * len(table)) * table.element_size() + 4 * targets * table.shape[1]
    return Step(
        activations=live.peak + loss,
        flops=int(counter.get_total_flops()),
        tokens=int(batch.cu_seqlens[-1]),
        visual_tokens=visual,
        backward_elements=sum(param.numel() for param in reached),
    )


def _visual(batch: Inputs) -> int:
    return sum(batch.counts) or batch.max_media * batch.num_samples


def _drop(param: Tensor) -> None:
    param.grad = None


def _note(used: set[nn.Module], module: nn.Module, args: Any, output: Any) -> None:
    if any(isinstance(value, Tensor) and value.requires_grad for value in tree_leaves(output)):
        used.add(module)
