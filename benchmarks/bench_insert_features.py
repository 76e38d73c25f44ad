"""insert_features against transformers' masked_scatter and torch's index_copy."""

from __future__ import annotations

import pytest
import torch

from fastmllm.kernels.insert_features import insert_features

CUDA = torch.cuda.is_available()
# tokens, features, width: LLaVA-1.5 (576 of a short prompt), a packed batch, SmolLM2
CASES = [(1024, 576, 4096), (16384, 12288, 4096), (16384, 4096, 576)] if CUDA else [(1024, 576, 2048), (512, 256, 576)]
DTYPES = (torch.bfloat16,) if CUDA else (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, count, width", CASES)
def bench_insert_features(compare, tokens, count, width, dtype, mode):
    device = "cuda" if CUDA else "cpu"
    torch.manual_seed(0)
    index = torch.arange(count, device=device) + (tokens - count) // 2
    mask = torch.zeros(tokens, 1, dtype=torch.bool, device=device).index_fill(0, index, True)
    embeddings = torch.randn(tokens, width).to(device, dtype).requires_grad_()
    features = torch.randn(count, width).to(device, dtype).requires_grad_()

    def masked_scatter(e, f):
        return e.masked_scatter(mask.expand_as(e), f)

    compare(
        op="insert_features",
        case=f"{count} of {tokens} x {width} {str(dtype)[6:]}",
        mode=mode,
        providers={
            "fastmllm": lambda e, f: insert_features(e, f, index),
            "masked_scatter": masked_scatter,
            "index_copy": lambda e, f: e.index_copy(0, index, f),
            "torch.compile": torch.compile(lambda e, f: e.index_copy(0, index, f)),
        },
        inputs=[embeddings, features],
        bytes=width
        * dtype.itemsize
        * {"forward": 2 * tokens, "backward": 2 * tokens + count, "full": 4 * tokens + count}[mode],
    )
