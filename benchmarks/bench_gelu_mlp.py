"""gelu_mlp against torch eager and torch.compile, at the MLPs of CLIP-L, SigLIP-so400m and Qwen2-VL."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmllm.kernels.gelu_mlp import bias_gelu_bwd_triton, bias_gelu_triton, gelu_mlp

CUDA = torch.cuda.is_available()
DTYPES = (torch.bfloat16,) if CUDA else (torch.float32, torch.bfloat16)
# D, F, activation, rows on a GPU, rows on a CPU
CASES = {
    "CLIP-L/336": (1024, 4096, "quick", 16 * 577, 64),
    "SigLIP-so400m": (1152, 4304, "tanh", 16 * 729, 64),
    "Qwen2-VL": (1280, 5120, "quick", 16384, 64),
    "DINOv2-B": (768, 3072, "none", 16 * 1370, 64),
    "56 px": (64, 256, "none", 4096, 256),
}


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield each activation, with all gradients and with a frozen tower (no bias gradient, no activation stored)."""
    for name in ("CLIP-L/336", "SigLIP-so400m", "DINOv2-B"):
        for learns in (True, False):
            yield f"{name}{'' if learns else ' frozen'}", lambda n=name, g=learns: _launch(n, g)


def _launch(name: str, learns: bool) -> None:
    _, width, approximate, _, _ = CASES[name]
    hidden = torch.empty((4096, width), dtype=torch.bfloat16, device="meta")
    bias = torch.empty(width, dtype=torch.bfloat16, device="meta") if learns else None
    bias_gelu_triton(hidden, bias, approximate, False)
    bias_gelu_bwd_triton(hidden, hidden, bias, approximate, learns, learns)


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES if CUDA else ["CLIP-L/336", "SigLIP-so400m", "56 px"])
def bench_gelu_mlp(compare, name, dtype, mode):
    device = "cuda" if CUDA else "cpu"
    width, hidden, approximate, *rows = CASES[name]
    rows = rows[0 if CUDA else 1]
    torch.manual_seed(0)

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_()

    leaves = [leaf(rows, width), leaf(hidden, width, scale=width**-0.5), leaf(hidden),
              leaf(width, hidden, scale=hidden**-0.5), leaf(width)]  # fmt: skip

    def eager(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        z = F.linear(x, weight1, bias1)
        y = z * torch.sigmoid(1.702 * z) if approximate == "quick" else F.gelu(z, approximate=approximate)
        return F.linear(y, weight2, bias2)

    compare(
        op="gelu_mlp",
        case=f"{name} {rows}x{width}x{hidden} {approximate} {str(dtype)[6:]}",
        mode=mode,
        providers={
            "fastmllm": lambda *t: gelu_mlp(*t, approximate),
            "torch": eager,
            "torch.compile": torch.compile(eager),
        },
        inputs=leaves,
        oracle=eager,
        bytes=sum(t.numel() for t in leaves) * leaves[0].element_size() * (1 if mode == "forward" else 2),
        flops=2 * 2 * rows * width * hidden * {"forward": 1, "backward": 2, "full": 3}[mode],
    )
