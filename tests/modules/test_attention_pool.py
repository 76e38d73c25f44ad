"""Attention pooling against torch's MultiheadAttention with one query, image by image."""

from __future__ import annotations

import torch
from torch import nn

from fastmllm.modules.attention_pool import AttentionPool


def test_equals_multihead_attention_for_each_image() -> None:
    torch.manual_seed(0)
    pool = AttentionPool(12, 3, 20, "gelu_tanh", 1e-6)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    reference = nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([pool.q.weight, pool.kv.weight]))
        reference.in_proj_bias.copy_(torch.cat([pool.q.bias, pool.kv.bias]))
        reference.out_proj.load_state_dict(pool.proj.state_dict())
    lengths = [5, 1, 7]
    x = torch.randn(13, 12, requires_grad=True)
    y = pool(x, torch.tensor([0, 5, 6, 13], dtype=torch.int32), 7)
    rows = [reference(pool.probe[None], part, part)[0] for part in x.split(lengths)]
    attended = torch.cat(rows)
    expected = attended + pool.mlp(pool.norm(attended))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(*(torch.autograd.grad(o.square().sum(), [x, pool.probe]) for o in (y, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert pool(x[:0], torch.zeros(1, dtype=torch.int32), 0).shape == (0, 12)
