"""splice_tokens against transformers' masked_scatter, LLaVA's torch.cat of slices, and one gather."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch

from fastmllm.kernels.splice_tokens import (
    SplicePlan,
    splice_plan,
    splice_tokens,
    splice_tokens_bwd_triton,
    splice_tokens_triton,
)

CUDA = torch.cuda.is_available()
IMAGE = 1
# name: (text tokens a sample, visual tokens of the samples' images, D)
CASES = {
    "LLaVA-1.5-7B": (96, [[576]] * 16, 4096),
    "SigLIP-so400m 729": (96, [[729]] * 16, 3584),
    "Qwen2.5-VL-7B": (256, [[1296], [324, 324], [2304], [64], [1024, 256, 256], []] * 2, 3584),
    "BLIP-2 OPT-2.7B": (48, [[32]] * 128, 2560),
}
CPU_CASES = {
    "LLaVA-1.5-7B": (96, [[576]] * 2, 4096),
    "Qwen2.5-VL-3B": (128, [[324], [64], [256, 100], []], 2048),
    "SmolLM2-135M 9": (24, [[9]] * 32, 576),
}


def _plan(text: int, counts: list[list[int]]) -> SplicePlan:
    samples = [[IMAGE] * len(images) + [0] * text for images in counts]
    bounds = [0]
    for sample in samples:
        bounds.append(bounds[-1] + len(sample))
    return splice_plan([t for s in samples for t in s], bounds, counts, placeholder=IMAGE)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield widths of language models: one program a row, several rows a program, a row with an odd tail, fp32."""
    yield "4096 bf16", lambda: _launch(16 * 97, 16 * 576, 4096)
    yield "576 bf16", lambda: _launch(1024, 8192, 576)
    yield "odd width bf16", lambda: _launch(1024, 8192, 1001)
    yield "fp32", lambda: _launch(1024, 8192, 2048, torch.float32)


def _launch(t: int, v: int, d: int, dtype: torch.dtype = torch.bfloat16) -> None:
    text, visual = (torch.empty(n, d, dtype=dtype, device="meta") for n in (t, v))
    source, text_rows, visual_rows = (torch.empty(n, dtype=torch.int64, device="meta") for n in (t + v - 16, t, v))
    out = splice_tokens_triton(text, visual, source, text_rows, visual_rows)
    splice_tokens_bwd_triton(out, text_rows, visual_rows, True, True)
    splice_tokens_bwd_triton(out, text_rows, visual_rows, False, True)


def _providers(plan: SplicePlan, counts: list[list[int]], device: str) -> dict[str, Callable[..., torch.Tensor]]:
    t = plan.text_rows.numel()
    mask = (plan.source >= t).unsqueeze(1).to(device)
    repeats = torch.ones(t, dtype=torch.int64)
    repeats[plan.text_rows < 0] = torch.tensor([n for images in counts for n in images])
    text_of, gather = torch.repeat_interleave(repeats).to(device), plan.source.to(device)
    rows = plan.source.tolist()
    breaks = [i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1 or rows[i] == t]
    stretches = [(rows[a], rows[b - 1] + 1) for a, b in pairwise([0, *breaks, len(rows)])]

    def masked_scatter(text, visual):
        wide = text.index_select(0, text_of)  # the embeddings of repeated placeholders
        return wide.masked_scatter(mask.expand_as(wide), visual)

    def slices(text, visual):
        return torch.cat([text[a:b] if a < t else visual[a - t : b - t] for a, b in stretches])

    def one_gather(text, visual):
        return torch.cat((text, visual)).index_select(0, gather)

    on_device = plan.to(device)
    return {
        "fastmllm": lambda text, visual: splice_tokens(text, visual, on_device),
        "masked_scatter": masked_scatter,
        "cat of slices": slices,
        "cat, index_select": one_gather,
        "torch.compile": torch.compile(one_gather),
    }


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen text", "trained text"])
@pytest.mark.parametrize("dtype", [torch.bfloat16] if CUDA else [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES if CUDA else CPU_CASES)
def bench_splice_tokens(compare, case, dtype, frozen, mode):
    if mode == "forward" and not frozen:
        pytest.skip("a forward pass knows nothing of gradients")
    text_tokens, counts, width = (CASES if CUDA else CPU_CASES)[case]
    device = "cuda" if CUDA else "cpu"
    torch.manual_seed(0)
    plan = _plan(text_tokens, counts)
    text = torch.randn(plan.text_rows.numel(), width).to(device, dtype).requires_grad_(not frozen)
    visual = torch.randn(plan.visual_rows.numel(), width).to(device, dtype).requires_grad_()
    moved = 2 * len(plan.source)
    back = 2 * len(visual) if frozen else moved + len(text) - len(plan.source) + len(visual)
    compare(
        op="splice_tokens",
        case=f"{case} {len(text)}+{len(visual)} x {width} {str(dtype)[6:]} {'frozen' if frozen else 'trained'} text",
        mode=mode,
        providers=_providers(plan, counts, device),
        inputs=[text, visual],
        bytes=width * dtype.itemsize * {"forward": moved, "backward": back, "full": moved + back}[mode],
    )
