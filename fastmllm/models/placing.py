"""Where a model goes that was just loaded: this rank's GPU, or the host, from where a trainer brings it in shares."""

from __future__ import annotations

import os

import torch
from torch import nn

ALONE = 0.5  # of a GPU's memory; more than that is no start for training on it whole


def loading_device(model: nn.Module) -> torch.device:
    """Return the GPU of this rank, or the host where there is none.

    Among several ranks a model of more than half of the GPU stays on the host, where all ranks share the pages of a
    checkpoint's file; ZeRO-3 takes it from there one parameter at a time.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    size = sum(param.nbytes for param in model.parameters())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and size > ALONE * torch.cuda.mem_get_info(device)[1]:
        return torch.device("cpu")
    return device
