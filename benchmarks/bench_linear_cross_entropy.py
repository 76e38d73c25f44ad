"""linear_cross_entropy against F.linear + F.cross_entropy, torch's chunked operator and Liger.

In instruction tuning most rows are image and prompt tokens: the share of scored rows is part of every case. "torch" is
what transformers' ForCausalLMLoss does: all logits, widened to fp32.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from fastmllm.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_bwd_triton,
    linear_cross_entropy_triton,
    sequence_log_probs,
)

CUDA = torch.cuda.is_available()
# name: (T, scored rows, D, V)
HEADS = {
    "SmolLM2-135M": (1024, 128, 576, 49152),
    "Qwen2.5-0.5B": (8192, 2048, 896, 151936),
    "Qwen2.5-7B": (8192, 1024, 3584, 152064),
    "Llama-3.1-8B all": (8192, 8192, 4096, 128256),
}
CPU_HEADS = {"SmolLM2-135M": (256, 32, 576, 49152)}


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield heads of real models; odd widths take the masked loads."""
    for name, shape in HEADS.items():
        yield f"{name} bf16", lambda s=shape: _launch(*s)
    yield "odd width bf16", lambda: _launch(2000, 1000, 1000, 32001)
    yield "fp32", lambda: _launch(1024, 128, 576, 49152, torch.float32)


def _launch(t: int, n: int, d: int, v: int, dtype: torch.dtype = torch.bfloat16) -> None:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    arguments = empty(t, d), empty(v, d), empty(t, dtype=torch.int64)
    linear_cross_entropy_triton(*arguments, -100, n, True, False)
    one, lse = empty(dtype=torch.float32), empty(t, dtype=torch.float32)
    linear_cross_entropy_bwd_triton(one, *arguments, lse, -100, n, True, True)


def _providers(labels: torch.Tensor, n: int, frozen: bool) -> dict[str, Callable[..., torch.Tensor]]:
    def ours(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, num_targets=n)

    def eager(hidden, weight):
        logits = F.linear(hidden, weight)
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels)

    def kept(hidden, weight):  # what a careful user writes; the indexing waits for a GPU
        rows = labels != -100
        logits = F.linear(hidden[rows], weight)
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels[rows])

    providers = {"fastmllm": ours, "torch": eager, "torch kept rows": kept}
    # its documentation: a win when T >= D; on the CPU shapes here it is 60 times slower than eager
    if CUDA and hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()

        def chunked(hidden, weight):
            return F.linear_cross_entropy(hidden, weight, labels, options=options).float()

        providers["torch chunked"] = chunked
    if CUDA and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        providers["liger"] = lambda hidden, weight: liger(weight, hidden, labels).float()
    return providers


@pytest.mark.parametrize("mode", ["forward", "full"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.bfloat16] if CUDA else [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", HEADS if CUDA else CPU_HEADS)
def bench_linear_cross_entropy(compare, head, dtype, frozen, mode):
    if mode == "forward" and not frozen:
        pytest.skip("a forward pass knows nothing of gradients")
    t, n, d, v = (HEADS if CUDA else CPU_HEADS)[head]
    torch.manual_seed(0)
    device = "cuda" if CUDA else "cpu"
    hidden = torch.randn(t, d, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, device=device) / d**0.5).to(dtype).requires_grad_(not frozen)
    labels = torch.randint(0, v, (t,), device=device)
    labels[torch.randperm(t, device=device)[n:]] = -100
    products = 1 if mode == "forward" else 2 if frozen else 3
    providers = _providers(labels, n, frozen)
    compare(
        op="linear_cross_entropy",
        case=f"{head} {n}/{t} rows {str(dtype)[6:]} {'frozen' if frozen else 'trained'}",
        mode=mode,
        providers=providers,
        inputs=[hidden, weight],
        oracle=None if CUDA else providers["torch"],
        bytes=(n * d + v * d * products) * hidden.element_size(),
        flops=2 * n * d * v * products,
    )


@pytest.mark.parametrize("mode", ["forward", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16] if CUDA else [torch.float32], ids=str)
@pytest.mark.parametrize("head", ["Qwen2.5-0.5B", "Qwen2.5-7B"] if CUDA else CPU_HEADS)
def bench_sequence_log_probs(compare, head, dtype, mode):
    """DPO with a trained head: 8 packed sequences, of which the answers' rows are scored."""
    t, n, d, v = (HEADS if CUDA else CPU_HEADS)[head]
    torch.manual_seed(0)
    device = "cuda" if CUDA else "cpu"
    hidden = torch.randn(t, d, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, device=device) / d**0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, v, (t,), device=device)
    labels.view(8, -1)[:, : (t - n) // 8] = -100
    bounds = torch.arange(0, t + 1, t // 8, device=device)

    def all_logits(hidden, weight):  # as TRL's log-probabilities: log_softmax of all rows, gather, mask
        logits = F.linear(hidden, weight)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        kept = labels != -100
        picked = logits.log_softmax(-1).gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
        return (picked * kept).view(8, -1).sum(1)

    products = 1 if mode == "forward" else 3
    compare(
        op="linear_cross_entropy",
        case=f"DPO {head} {n}/{t} rows {str(dtype)[6:]}",
        mode=mode,
        providers={
            "fastmllm": lambda h, w: sequence_log_probs(h, w, labels, bounds, num_targets=n),
            "torch": all_logits,
        },
        inputs=[hidden, weight],
        oracle=None if CUDA else all_logits,
        bytes=(n * d + v * d * products) * hidden.element_size(),
        flops=2 * n * d * v * products,
    )
