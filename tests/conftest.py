"""Session set-up: kernels run in the Triton interpreter unless a GPU is there."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel file is imported
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
torch.manual_seed(0)
