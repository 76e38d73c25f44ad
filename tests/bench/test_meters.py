"""Meters count what they claim: FLOPs of our operators, live bytes, and the Pareto front."""

from __future__ import annotations

import torch
from torch import nn

from fastmllm.bench.meters import count_flops, milliseconds, peak_bytes
from fastmllm.kernels.attention import attention
from fastmllm.kernels.linear_cross_entropy import linear_cross_entropy
from fastmllm.kernels.patch_embed import patch_embed


def test_flops_of_linear_layers_and_our_operators():
    layer = nn.Linear(10, 20)
    assert count_flops(lambda: layer(torch.randn(3, 10))) == 2 * 3 * 10 * 20
    q = torch.randn(6, 2, 8)
    starts = torch.tensor([0, 4, 6], dtype=torch.int32)
    full = count_flops(lambda: attention(q, q, q, starts, max_seqlen_q=4))
    assert full == 4 * 2 * 8 * (4 * 4 + 2 * 2)
    causal = count_flops(lambda: attention(q, q, q, starts, max_seqlen_q=4, causal=True))
    assert causal == 4 * 2 * 8 * (10 + 3)
    pixels, weight = torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.randn(48, 5)
    assert count_flops(lambda: patch_embed(pixels, weight, patch_size=4)) == 2 * (2 * 4) * 48 * 5


def test_ignored_rows_cost_no_flops():
    hidden, weight = torch.randn(8, 4), torch.randn(11, 4)
    labels = torch.full((8,), -100)
    labels[:2] = 3
    flops = count_flops(lambda: linear_cross_entropy(hidden, weight, labels, reduction="sum", num_targets=2))
    assert flops == 2 * 2 * 4 * 11


def test_peak_counts_what_lives_at_once():
    def chain():
        x = torch.zeros(1000)  # 4 kB
        y = x + 1  # both live
        del x
        return (y * 2).sum()  # y and y * 2

    assert 8000 <= peak_bytes(chain) <= 8100


def test_peak_ignores_views_and_what_was_there():
    x = torch.zeros(1000)
    assert peak_bytes(lambda: x.view(10, 100).t()) == 0


def test_milliseconds_is_a_median():
    calls = []
    assert milliseconds(lambda: calls.append(1), repeats=3, warmup=2) >= 0
    assert len(calls) == 5
