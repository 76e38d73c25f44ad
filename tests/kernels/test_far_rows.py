"""Rows more than 2^31 elements apart: every kernel that takes strided rows computes their offsets in 64 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmllm.kernels import attention as self_op
from fastmllm.kernels import attention_scores as scores_op
from fastmllm.kernels import cross_attention as cross_op
from fastmllm.kernels import vision_rope as rope_op

ROWS, HEADS, D = 34, 2, 16
APART = (1 << 26) + 64  # elements between rows: the last one lies behind 2^31


@pytest.fixture
def near(device) -> Tensor:
    return torch.randn(ROWS, 3 * HEADS, D, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)


@pytest.fixture
def far(near: Tensor, device) -> Tensor:
    """The same values in rows far apart: pages between them are never touched, so a CPU does not hold them."""
    try:
        flat = torch.empty((ROWS - 1) * APART + near[0].numel(), dtype=near.dtype, device=device)
    except RuntimeError:
        pytest.skip("no address space for 4 GiB")
    rows = flat.as_strided(near.shape, (APART, D, 1))
    rows.copy_(near)
    assert rows.stride(0) * (ROWS - 1) > 1 << 31
    return rows


def _parts(packed: Tensor) -> tuple[Tensor, ...]:
    return packed.split(HEADS, 1)


def _same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_attention(near, far, device):
    starts = torch.tensor([0, ROWS], dtype=torch.int32, device=device)
    options = (starts, starts, ROWS, ROWS, False, 0.25)
    out, lse = self_op.attention_triton(*_parts(near), *options)
    _same(self_op.attention_triton(*_parts(far), *options), (out, lse))
    want = self_op.attention_bwd_triton(out, *_parts(near), out, lse, *options)
    _same(self_op.attention_bwd_triton(out, *_parts(far), out, lse, *options), want)


def test_attention_scores(near, far, device):
    starts = torch.tensor([0, ROWS], dtype=torch.int32, device=device)
    lse = torch.zeros(HEADS, ROWS, device=device)
    options = (lse, starts, starts, ROWS, False, 0.25, "mean", None, None, None, None)
    want = scores_op.attention_scores_triton(*_parts(near)[:2], *options)
    assert torch.equal(scores_op.attention_scores_triton(*_parts(far)[:2], *options), want)


def test_cross_attention(near, far, device):
    start, stop = (torch.full((ROWS,), n, dtype=torch.int32, device=device) for n in (0, ROWS))
    options = (start, stop, ROWS, ROWS, 0.25)
    out, lse = cross_op.cross_attention_triton(*_parts(near), *options)
    _same(cross_op.cross_attention_triton(*_parts(far), *options), (out, lse))
    want = cross_op.cross_attention_bwd_triton(out, *_parts(near), out, lse, *options, True, True)
    _same(cross_op.cross_attention_bwd_triton(out, *_parts(far), out, lse, *options, True, True), want)


def test_vision_rope(near, far, device):
    cos, sin = (torch.randn(ROWS, D // 2, device=device) for _ in range(2))
    want = rope_op.vision_rope_triton(near, cos, sin, HEADS, HEADS, False, True)
    _same(rope_op.vision_rope_triton(far, cos, sin, HEADS, HEADS, False, True), want)
