"""Operations counted on the meta device are those of the same call with numbers, where segments are equal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastmllm.kernels.attention import attention
from fastmllm.kernels.attention_scores import attention_scores
from fastmllm.kernels.cross_attention import cross_attention
from fastmllm.kernels.greedy_diverse import greedy_diverse
from fastmllm.kernels.token_merge import token_merge
from fastmllm.models.flops import flop_formulas
from fastmllm.models.meta_flops import meta_flop_formulas

N, HEADS, WIDTH, LONGEST, SEGMENTS = 12, 2, 8, 6, 2


def call_attention(x: Tensor, cu: Tensor, causal: bool) -> None:
    attention(x, x, x, cu, max_seqlen_q=LONGEST, causal=causal)


def call_cross(x: Tensor, cu: Tensor) -> None:
    start = torch.zeros(N, dtype=torch.int32, device=x.device)
    cross_attention(x, x, x, start, start + 5, max_seqlen_q=LONGEST, max_seqlen_k=5)


def call_scores(x: Tensor, cu: Tensor, rows: str, causal: bool = False) -> None:
    attention_scores(x, x, x.new_zeros(HEADS, N), cu, max_seqlen_k=LONGEST, rows=rows, causal=causal)


def call_merge(x: Tensor, cu: Tensor) -> None:
    token_merge(x[:, 0], x[:, 0], None, [1, 1], cu_seqlens=cu, max_seqlen=LONGEST, protected=0)


def call_diverse(x: Tensor, cu: Tensor, method: str) -> None:
    greedy_diverse(x[:, 0].contiguous(), cu, 2, method, max_seqlen=LONGEST)


PAIRS = SEGMENTS * LONGEST**2
BELOW = SEGMENTS * LONGEST * (LONGEST + 1) // 2
HEAD = 2 * HEADS * WIDTH  # of one product of a query and a key
CASES = [  # call, its options, operations by hand
    (call_attention, {"causal": False}, 2 * HEAD * PAIRS),
    (call_attention, {"causal": True}, 2 * HEAD * BELOW),
    (call_cross, {}, 2 * HEAD * N * 5),
    (call_scores, {"rows": "all"}, HEAD * PAIRS),
    (call_scores, {"rows": "all", "causal": True}, HEAD * BELOW),
    (call_scores, {"rows": "first"}, HEAD * N),
    (call_scores, {"rows": "last"}, HEAD * N),
    (call_merge, {}, 2 * WIDTH * SEGMENTS * (LONGEST // 2) ** 2),
    (call_diverse, {"method": "max_min"}, 2 * WIDTH * PAIRS),
    (call_diverse, {"method": "coverage"}, 2 * WIDTH * PAIRS),
    (call_diverse, {"method": "dpp"}, SEGMENTS * (2 * WIDTH * 2 * LONGEST + 2 * LONGEST)),
]


@pytest.mark.parametrize(("call", "options", "expected"), CASES)
def test_a_call_counts_the_same_with_and_without_numbers(call, options: dict, expected: int) -> None:
    x, cu = torch.randn(N, HEADS, WIDTH), torch.tensor([0, 6, 12], dtype=torch.int32)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=flop_formulas()) as real:
        call(x, cu, **options)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=meta_flop_formulas()) as meta:
        call(x.to("meta"), cu.to("meta"), **options)
    assert real.get_total_flops() == meta.get_total_flops() == expected
