"""gated_residual, alone and with its norm, against torch eager and torch.compile: OpenFlamingo, Llama-3.2-Vision."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from fastmllm.kernels.gated_residual import (
    MAX_WIDTH,
    MAX_WIDTH_NARROW,
    gated_residual,
    gated_residual_bwd_triton,
    gated_residual_norm_bwd_triton,
    gated_residual_norm_triton,
    gated_residual_triton,
)

CUDA = torch.cuda.is_available()
ROWS = 16384 if CUDA else 512
DTYPES = (torch.bfloat16,) if CUDA else (torch.float32, torch.bfloat16)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield a scalar gate (Llama-3.2-Vision, OpenFlamingo) and one a channel (Idefics), and the widest row."""
    for width in (1024, 2048, 4096, MAX_WIDTH):
        for scalar in (True, False):
            yield f"{width} {'scalar' if scalar else 'channels'}", lambda w=width, s=scalar: _launch(w, s)
    for width, scalar in ((2048, True), (4096, True), (MAX_WIDTH, True), (MAX_WIDTH_NARROW, False)):
        for kind in ("rms", "layer")[: 1 + (width <= MAX_WIDTH_NARROW)]:
            name = f"{width} {'scalar' if scalar else 'channels'} {kind}"
            yield name, lambda w=width, s=scalar, k=kind: _launch_norm(w, s, k == "layer")
    yield f"{MAX_WIDTH_NARROW} channels layer fp32", lambda: _launch_norm(MAX_WIDTH_NARROW, False, True, torch.float32)


def _launch(width: int, scalar: bool) -> None:
    x = torch.empty((4096, width), dtype=torch.bfloat16, device="meta")
    gate = torch.empty(1 if scalar else width, dtype=torch.float32, device="meta")
    gated_residual_triton(x, x, gate)
    gated_residual_bwd_triton(x, x, gate, True, True)


def _launch_norm(width: int, scalar: bool, layer: bool, dtype: torch.dtype = torch.bfloat16) -> None:
    x, weight = torch.empty((4096, width), dtype=dtype, device="meta"), torch.empty(width, dtype=dtype, device="meta")
    gate = torch.empty(1 if scalar else width, dtype=dtype, device="meta")
    _, _, mean, rstd = gated_residual_norm_triton(x, x, gate, weight, weight if layer else None, layer, 1e-5)
    gated_residual_norm_bwd_triton(x, x, x, x, gate, weight, mean, rstd, layer, True, True, True, True, layer)


def _inputs(width: int, dtype: torch.dtype, scalar: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    device = "cuda" if CUDA else "cpu"
    shapes = ((ROWS, width), (ROWS, width), (1 if scalar else width,))
    return [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]


def _case(width: int, dtype: torch.dtype, scalar: bool) -> str:
    return f"{ROWS}x{width} {str(dtype)[6:]} {'scalar' if scalar else 'channels'}"


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
@pytest.mark.parametrize("scalar", [True, False], ids=["scalar", "channels"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", (2048, 4096, 8192) if CUDA else (1024,))
def bench_gated_residual(compare, width, dtype, scalar, mode):
    inputs = _inputs(width, dtype, scalar)

    def eager(x, branch, gate):
        return x + gate.tanh() * branch

    tensor = inputs[0].numel() * inputs[0].element_size()
    compare(
        op="gated_residual",
        case=_case(width, dtype, scalar),
        mode=mode,
        providers={"fastmllm": gated_residual, "torch": eager, "torch.compile": torch.compile(eager)},
        inputs=inputs,
        bytes=tensor * {"forward": 3, "backward": 3, "full": 6}[mode],
        flops=inputs[0].numel() * {"forward": 2, "backward": 3, "full": 5}[mode],
    )


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", (2048, 4096, 8192) if CUDA else (1024,))
def bench_with_norm(compare, width, dtype, kind, mode):
    inputs = _inputs(width, dtype, True)
    inputs.append(torch.randn(width, device=inputs[0].device, dtype=dtype).requires_grad_())

    def ours(x, branch, gate, weight):
        return gated_residual(x, branch, gate, weight, kind=kind)

    def eager(x, branch, gate, weight):
        h = x + gate.tanh() * branch
        norm = F.rms_norm if kind == "rms" else F.layer_norm
        return h, norm(h, weight.shape, weight, eps=1e-5)

    tensor = inputs[0].numel() * inputs[0].element_size()
    compare(
        op="gated_residual",
        case=f"{_case(width, dtype, True)} {kind}",
        mode=mode,
        providers={"fastmllm": ours, "torch": eager, "torch.compile": torch.compile(eager)},
        inputs=inputs,
        oracle=eager,
        bytes=tensor * {"forward": 4, "backward": 6, "full": 10}[mode],
        flops=inputs[0].numel() * {"forward": 6, "backward": 12, "full": 18}[mode],
    )
