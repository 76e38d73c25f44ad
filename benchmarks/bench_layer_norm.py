"""layer_norm against torch eager and torch.compile, at the widths of CLIP, SigLIP, DINOv2 and Qwen vision towers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from fastmllm.kernels.layer_norm import MAX_WIDTH, layer_norm, layer_norm_bwd_triton, layer_norm_triton

CUDA = torch.cuda.is_available()
WIDTHS = (384, 1024, 1152, 4096)
ROWS = 32768 if CUDA else 512
DTYPES = (torch.bfloat16,) if CUDA else (torch.float32, torch.bfloat16)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the widths of vision towers and the largest one, bare and frozen, or with residual and weight gradient."""
    for width in (*WIDTHS, MAX_WIDTH):
        for residual in (False, True):
            yield f"{width}{' residual' if residual else ''}", lambda w=width, r=residual: _launch(w, r)
    for width in (4096, MAX_WIDTH):
        yield f"{width} residual fp32", lambda w=width: _launch(w, True, torch.float32)


def _launch(width: int, residual: bool, dtype: torch.dtype = torch.bfloat16) -> None:
    x, w = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((4096, width), (width,)))
    mean = torch.empty(4096, dtype=torch.float32, device="meta")
    layer_norm_triton(x, w, w, x if residual else None, 1e-6)
    layer_norm_bwd_triton(x, x if residual else None, x, w, mean, mean, residual)


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS if CUDA else (384, 1152))
def bench_layer_norm(compare, width, dtype, residual, mode):
    device = "cuda" if CUDA else "cpu"
    torch.manual_seed(0)
    x, r = (torch.randn(ROWS, width, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    w, b = (torch.randn(width, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    leaves = [x, w, b, *([r] if residual else [])]

    def ours(x, w, b, r=None):
        return layer_norm(x, w, b, r)

    def eager(x, w, b, r=None):
        h = x if r is None else x + r
        y = F.layer_norm(h, w.shape, w, b)
        return y if r is None else (y, h)

    tensor = x.numel() * x.element_size()
    forward = tensor * (4 if residual else 2)
    backward = tensor * (4 if residual else 3)
    compare(
        op="layer_norm",
        case=f"{ROWS}x{width} {str(dtype)[6:]}{' residual' if residual else ''}",
        mode=mode,
        providers={"fastmllm": ours, "torch": eager, "torch.compile": torch.compile(eager)},
        inputs=leaves,
        oracle=eager,  # torch's own weight gradient is the inexact one in bf16
        bytes={"forward": forward, "backward": backward, "full": forward + backward}[mode],
        flops=x.numel() * {"forward": 8, "backward": 14, "full": 22}[mode],
    )
