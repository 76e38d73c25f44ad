"""layer_norm against torch eager, torch.compile and Liger, at the widths of CLIP, SigLIP, DINOv2 and Qwen towers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastmllm.kernels._norm import MAX_SCALED_WIDTH, MAX_WIDTH
from fastmllm.kernels.layer_norm import layer_norm, layer_norm_bwd_triton, layer_norm_triton

CUDA = torch.cuda.is_available()
WIDTHS = (384, 768, 1024, 1152, 1280, 1408, 3200, 4096)
ROWS = 32768 if CUDA else 512
DTYPES = (torch.bfloat16,) if CUDA else (torch.float32, torch.bfloat16)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the widths of vision towers and the largest one: bare and frozen, with residual, with LayerScale too."""
    for width in (384, 1024, 1152, MAX_SCALED_WIDTH, MAX_WIDTH):
        for added in ("", "residual", "scale")[: 3 if width <= MAX_SCALED_WIDTH else 2]:
            yield f"{width} {added}".strip(), lambda w=width, a=added: _launch(w, a)
    for width, added in ((MAX_SCALED_WIDTH, "residual"), (MAX_SCALED_WIDTH, "scale"), (MAX_WIDTH, "residual")):
        yield f"{width} {added} fp32", lambda w=width, a=added: _launch(w, a, torch.float32)


def _launch(width: int, added: str, dtype: torch.dtype = torch.bfloat16) -> None:
    x, w = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((4096, width), (width,)))
    mean = torch.empty(4096, dtype=torch.float32, device="meta")
    r, s, learned = x if added else None, w if added == "scale" else None, bool(added)
    layer_norm_triton(x, w, w, r, s, 1e-6)
    layer_norm_bwd_triton(x, r, x, None if s is None else x, w, s, mean, mean, learned, learned)


def _liger() -> dict[str, Callable[..., Any]]:
    """Return Liger's layer norm where it is installed; it has no residual."""
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    except ImportError:
        return {}
    return {"liger": lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, 1e-5)}


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
@pytest.mark.parametrize("added", ["plain", "residual", "scale"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS if CUDA else (384, 1152))
def bench_layer_norm(compare, width, dtype, added, mode):
    device = "cuda" if CUDA else "cpu"
    torch.manual_seed(0)
    x, r = (torch.randn(ROWS, width, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    w, b, s = (torch.randn(width, device=device, dtype=dtype).requires_grad_() for _ in range(3))
    leaves = {"plain": [x, w, b], "residual": [x, w, b, r], "scale": [x, w, b, r, s]}[added]

    def ours(x, w, b, r=None, s=None):
        return layer_norm(x, w, b, r, scale=s)

    def eager(x, w, b, r=None, s=None):
        h = x if s is None else s * x
        h = h if r is None else r + h
        y = F.layer_norm(h, w.shape, w, b)
        return y if r is None else (y, h)

    tensor = x.numel() * x.element_size()
    # forward: x, y and r, h; backward: dy, h, dh and grad_h and dx, x
    forward = tensor * (2 if added == "plain" else 4)
    backward = tensor * {"plain": 3, "residual": 4, "scale": 6}[added]
    compare(
        op="layer_norm",
        case=f"{ROWS}x{width} {str(dtype)[6:]}{'' if added == 'plain' else ' ' + added}",
        mode=mode,
        providers={"fastmllm": ours, "torch": eager, "torch.compile": torch.compile(eager)}
        | (_liger() if CUDA and added == "plain" else {}),
        inputs=leaves,
        oracle=eager,  # torch's own weight gradient is the inexact one in bf16
        bytes={"forward": forward, "backward": backward, "full": forward + backward}[mode],
        flops=x.numel() * {"forward": 8, "backward": 14, "full": 22}[mode],
    )
