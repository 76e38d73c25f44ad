"""rms_norm against torch eager, torch.compile and Liger, at the widths of Qwen2.5-VL, InternViT and language models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastmllm.kernels._norm import MAX_SCALED_WIDTH, MAX_WIDTH
from fastmllm.kernels.rms_norm import rms_norm, rms_norm_bwd_triton, rms_norm_triton

CUDA = torch.cuda.is_available()
WIDTHS = (384, 576, 1024, 1280, 2048, 3200, 3584, 4096)  # 1280 Qwen2.5-VL's tower, 3200 InternViT-6B
ROWS = 32768 if CUDA else 512
DTYPES = (torch.bfloat16,) if CUDA else (torch.float32, torch.bfloat16)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield usual widths and the largest one: bare and frozen, with residual, with LayerScale too."""
    for width in (1280, MAX_SCALED_WIDTH, MAX_WIDTH):
        for added in ("", "residual", "scale")[: 3 if width <= MAX_SCALED_WIDTH else 2]:
            yield f"{width} {added}".strip(), lambda w=width, a=added: _launch(w, a)
    for width, added in ((MAX_SCALED_WIDTH, "scale"), (MAX_WIDTH, "residual")):
        yield f"{width} {added} fp32", lambda w=width, a=added: _launch(w, a, torch.float32)


def _launch(width: int, added: str, dtype: torch.dtype = torch.bfloat16) -> None:
    x, w = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((4096, width), (width,)))
    rstd = torch.empty(4096, dtype=torch.float32, device="meta")
    r, s = x if added else None, w if added == "scale" else None
    rms_norm_triton(x, w, r, s, 1e-6, 0.0)
    rms_norm_bwd_triton(x, r, x, None if s is None else x, w, s, rstd, 0.0, bool(added))


def _liger(residual: bool) -> dict[str, Callable[..., Any]]:
    """Return Liger's RMS norm where it is installed, not in place: the benchmark runs one graph many times."""
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except ImportError:
        return {}
    if residual:
        return {"liger": lambda x, w, r: LigerFusedAddRMSNormFunction.apply(x, r, w, 1e-6, 0.0, "gemma", False)}
    return {"liger": lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "gemma", False)}


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
@pytest.mark.parametrize("added", ["plain", "residual", "scale"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS if CUDA else (576, 1280))
def bench_rms_norm(compare, width, dtype, added, mode):
    device = "cuda" if CUDA else "cpu"
    torch.manual_seed(0)
    x, r = (torch.randn(ROWS, width, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    w, s = (torch.randn(width, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    leaves = {"plain": [x, w], "residual": [x, w, r], "scale": [x, w, r, s]}[added]

    def ours(x, w, r=None, s=None):
        return rms_norm(x, w, r, scale=s)

    def eager(x, w, r=None, s=None):
        h = x if s is None else s * x
        h = h if r is None else r + h
        y = F.rms_norm(h, w.shape, w, 1e-6)
        return y if r is None else (y, h)

    tensor = x.numel() * x.element_size()
    # forward: x, y and r, h; backward: dy, h, dh and grad_h and dx, x
    forward = tensor * (2 if added == "plain" else 4)
    backward = tensor * {"plain": 3, "residual": 4, "scale": 6}[added]
    compare(
        op="rms_norm",
        case=f"{ROWS}x{width} {str(dtype)[6:]}{'' if added == 'plain' else ' ' + added}",
        mode=mode,
        providers={"fastmllm": ours, "torch": eager, "torch.compile": torch.compile(eager)}
        | (_liger(added == "residual") if CUDA and added != "scale" else {}),
        inputs=leaves,
        oracle=eager,  # torch's own weight gradient is the inexact one in bf16
        bytes={"forward": forward, "backward": backward, "full": forward + backward}[mode],
        flops=x.numel() * {"forward": 5, "backward": 11, "full": 16}[mode],
    )
