"""The roofline of a call: the longer of products and bytes, operator by operator."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastmllm.bench.roofline import Rates, measure_rates, roofline_ms
from fastmllm.kernels.attention import attention
from fastmllm.kernels.gelu_mlp import gelu_mlp


def test_the_longer_of_products_and_bytes_counts():
    layer = nn.Linear(10, 20, bias=False)
    call = lambda: layer(torch.zeros(3, 10))  # noqa: E731
    assert roofline_ms(call, Rates(flops=1e3, bytes=math.inf)) == pytest.approx(2 * 3 * 10 * 20)
    assert roofline_ms(call, Rates(flops=math.inf, bytes=1e3)) == pytest.approx(4 * (30 + 200 + 60))
    with torch.inference_mode():
        assert roofline_ms(call, Rates(flops=1e3, bytes=math.inf)) == pytest.approx(2 * 3 * 10 * 20)


def test_operators_of_our_own_count_and_the_rest_does_not():
    x, a, b = torch.zeros(4, 6), torch.zeros(8, 6), torch.zeros(5, 8)
    rates = Rates(flops=1e3, bytes=math.inf)
    assert roofline_ms(lambda: gelu_mlp(x, a, None, b, None), rates) == pytest.approx(2 * 4 * (48 + 40))
    q, starts = torch.zeros(4, 2, 3), torch.tensor([0, 4], dtype=torch.int32)
    assert roofline_ms(lambda: attention(q, q, q, starts, max_seqlen_q=4), rates) == pytest.approx(4 * 6 * 16)
    assert roofline_ms(lambda: x.exp().sort(), rates) == 0


def test_rates_are_this_machines():
    rates = measure_rates(torch.float32, side=128)
    assert 1e8 < rates.flops < 1e16
    assert 1e7 < rates.bytes < 1e14
