"""The gated cross-attention block against OpenFlamingo's formula, restated densely."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmllm.kernels.cross_attention import media_ranges
from fastmllm.modules.cross_attention import GatedCrossAttention

WIDTH, MEDIA_WIDTH, LATENTS = 20, 12, 3


def dense(block: GatedCrossAttention, x: Tensor, media: Tensor, locations: Tensor) -> Tensor:
    """Restate OpenFlamingo for one sample.

    x (T, D); media (I, L, Dm); locations (T,) bool, true where an image's token stands. A row attends to the latest
    image at or before it, through a mask; rows before the first image are zeroed after the softmax.
    """
    text_time = locations.cumsum(0)  # (T,)
    media_time = torch.arange(1, len(media) + 1).repeat_interleave(media.shape[1])
    q = block.to_q(F.layer_norm(x, (WIDTH,), block.norm.weight, block.norm.bias))
    k, v = block.to_kv(media.flatten(0, 1)).chunk(2, -1)
    q, k, v = (t.unflatten(-1, (block.num_heads, block.head_dim)).transpose(0, 1) for t in (q, k, v))  # (H, ., Dh)
    scores = q @ k.transpose(1, 2) * block.head_dim**-0.5
    scores = scores.masked_fill(text_time[:, None] != media_time[None], -torch.finfo(scores.dtype).max)
    weights = scores.softmax(-1).masked_fill((text_time == 0)[None, :, None], 0.0)
    x = block.to_out((weights @ v).transpose(0, 1).flatten(1)) * block.attn_gate.tanh() + x
    y = F.layer_norm(x, (WIDTH,), block.ffn_norm.weight, block.ffn_norm.bias)
    return block.fc2(F.gelu(block.fc1(y))) * block.ffn_gate.tanh() + x


def build(gate: float) -> GatedCrossAttention:
    torch.manual_seed(0)
    block = GatedCrossAttention(WIDTH, MEDIA_WIDTH, num_heads=2, head_dim=8)
    for parameter in (block.norm.weight, block.norm.bias, block.ffn_norm.weight, block.ffn_norm.bias):
        torch.nn.init.normal_(parameter)
    torch.nn.init.constant_(block.attn_gate, gate)
    torch.nn.init.constant_(block.ffn_gate, -gate)
    return block


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor, list[tuple[slice, slice, Tensor]]]:
    """Draw two packed samples: 7 rows with images at 2 and 4, then 5 rows with one image at 0."""
    torch.manual_seed(1)
    x, media = torch.randn(12, WIDTH), torch.randn(3 * LATENTS, MEDIA_WIDTH)
    first = torch.zeros(7, dtype=torch.bool)
    first[[2, 4]] = True
    second = torch.zeros(5, dtype=torch.bool)
    second[0] = True
    samples = [(slice(0, 7), slice(0, 2), first), (slice(7, 12), slice(2, 3), second)]
    is_media = torch.cat([first, second])
    start, stop = media_ranges(
        is_media, torch.tensor([0, 7, 12], dtype=torch.int32), torch.arange(4, dtype=torch.int32) * LATENTS
    )
    return x, media, start, stop, samples


def test_equals_openflamingo_forward_and_backward() -> None:
    block = build(0.7)
    x, media, start, stop, samples = batch()
    x.requires_grad_()
    media.requires_grad_()
    inputs = [x, media, *block.parameters()]
    y = block(x, media, start, stop)
    images = media.unflatten(0, (-1, LATENTS))
    expected = torch.cat([dense(block, x[rows], images[mine], places) for rows, mine, places in samples])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)

    weight = torch.randn_like(y)
    grads = torch.autograd.grad((y * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_fresh_block_changes_nothing_and_trains_its_gates() -> None:
    torch.manual_seed(0)
    block = GatedCrossAttention(WIDTH, MEDIA_WIDTH, num_heads=2, head_dim=8)
    x, media, start, stop, _ = batch()
    y = block(x, media, start, stop)
    assert torch.equal(y, x)
    (y * torch.randn_like(y)).sum().backward()
    moved = {name for name, p in block.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {"attn_gate", "ffn_gate"}


def test_rows_without_media_see_no_media() -> None:
    block = build(0.7)
    x, media, start, stop, _ = batch()
    y, other = block(x, media, start, stop), block(x, media * 3 + 1, start, stop)
    assert torch.equal(y[:2], other[:2])
    assert not torch.allclose(y[2:], other[2:])
    assert not torch.equal(y[:2], x[:2])  # the feed-forward branch still runs
    none = torch.zeros(12, dtype=torch.int32)
    torch.testing.assert_close(block(x, media[:0], none, none)[:2], y[:2])


def test_kept_keys_and_values_give_the_same() -> None:
    block = build(0.7)
    x, media, start, stop, _ = batch()
    k, v = block.project_media(media)
    whole = block(x, media, start, stop)
    steps = [block.attend(x[t : t + 1], k, v, start[t : t + 1], stop[t : t + 1]) for t in range(12)]
    torch.testing.assert_close(torch.cat(steps), whole, rtol=1e-4, atol=1e-5)


def test_bfloat16_follows_float32() -> None:
    block = build(0.7)
    x, media, start, stop, _ = batch()
    with torch.no_grad():
        expected = block(x, media, start, stop)
        y = block.bfloat16()(x.bfloat16(), media.bfloat16(), start, stop)
    assert y.dtype == torch.bfloat16
    assert ((y.float() - expected).norm() / expected.norm()).item() < 0.03


def test_default_heads_are_openflamingos() -> None:
    block = GatedCrossAttention(16, 12)
    assert tuple(block.to_q.weight.shape) == (512, 16)
    assert tuple(block.fc1.weight.shape) == (64, 16)


def test_rejects_what_does_not_fit() -> None:
    block = build(0.0)
    x, media, start, stop, _ = batch()
    with pytest.raises(ValueError, match="packed"):
        block(x, media.unflatten(0, (3, -1)), start, stop)
    with pytest.raises(ValueError, match="media_start"):
        block(x, media, start[:5], stop)
    with pytest.raises(ValueError, match="head_dim=0"):
        GatedCrossAttention(8, 8, head_dim=0)
