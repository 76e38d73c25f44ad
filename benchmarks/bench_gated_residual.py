"""gated_residual against torch eager and torch.compile, at the widths of OpenFlamingo and Llama-3.2-Vision."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from fastmllm.kernels.gated_residual import gated_residual, gated_residual_bwd_triton, gated_residual_triton

CUDA = torch.cuda.is_available()
ROWS = 16384 if CUDA else 512
DTYPES = (torch.bfloat16,) if CUDA else (torch.float32, torch.bfloat16)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield a scalar gate (Llama-3.2-Vision, OpenFlamingo) and one a channel (Idefics), also frozen."""
    for width in (1024, 2048, 4096):
        for scalar in (True, False):
            yield f"{width} {'scalar' if scalar else 'channels'}", lambda w=width, s=scalar: _launch(w, s)


def _launch(width: int, scalar: bool) -> None:
    x = torch.empty((4096, width), dtype=torch.bfloat16, device="meta")
    gate = torch.empty(1 if scalar else width, dtype=torch.float32, device="meta")
    gated_residual_triton(x, x, gate)
    gated_residual_bwd_triton(x, x, gate, True, True)


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
@pytest.mark.parametrize("scalar", [True, False], ids=["scalar", "channels"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", (2048, 4096) if CUDA else (1024,))
def bench_gated_residual(compare, width, dtype, scalar, mode):
    device = "cuda" if CUDA else "cpu"
    torch.manual_seed(0)
    x, branch = (torch.randn(ROWS, width, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    gate = torch.randn(1 if scalar else width, device=device, dtype=dtype).requires_grad_()

    def eager(x, branch, gate):
        return x + gate.tanh() * branch

    tensor = x.numel() * x.element_size()
    compare(
        op="gated_residual",
        case=f"{ROWS}x{width} {str(dtype)[6:]} {'scalar' if scalar else 'channels'}",
        mode=mode,
        providers={"fastmllm": gated_residual, "torch": eager, "torch.compile": torch.compile(eager)},
        inputs=[x, branch, gate],
        bytes=tensor * {"forward": 3, "backward": 3, "full": 6}[mode],
        flops=x.numel() * {"forward": 2, "backward": 3, "full": 5}[mode],
    )
