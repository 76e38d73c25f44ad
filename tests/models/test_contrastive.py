"""Contrastive losses against open_clip's formulas in fp64, alone and over two ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import ranks
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate
from torch import Tensor

from fastmllm.models.contrastive import ClipLoss, SiglipLoss, _Bounded


def clip_formula(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Half the cross entropy of the rows, half that of the columns, of the whole logits."""
    logits = scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def siglip_formula(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Sum of -log sigmoid(z x) with z = 1 on the diagonal and -1 elsewhere, over the number of images."""
    logits = scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T + bias
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


CASES = [(ClipLoss, clip_formula), (SiglipLoss, siglip_formula)]


def features(n: int, width: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    image = torch.randn(n, width, generator=generator)
    return image, image + torch.randn(n, width, generator=generator)


def parameters(loss: torch.nn.Module, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [p.detach().to(dtype).requires_grad_() for p in loss.parameters()]


@pytest.mark.parametrize(("kind", "formula"), CASES)
@pytest.mark.parametrize("n", [1, 7])
def test_equals_the_formula(kind: type, formula, n: int) -> None:
    loss = kind()
    image, text = (t.requires_grad_() for t in features(n))
    value = loss(image, text)
    got = [value, *torch.autograd.grad(value, [image, text, *loss.parameters()])]
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (image, text)] + parameters(loss, dtype)
        expected = formula(*inputs)
        results.append([expected, *torch.autograd.grad(expected, inputs)])
    for mine, same, oracle in zip(got, *results, strict=True):
        if n > 1 or kind is SiglipLoss:  # alone, an image cannot choose wrongly: 0, and noise in torch
            assert_as_accurate(mine, same, oracle, factor=3.0, ulps=16.0)
        else:
            assert mine.abs().max() < 1e-6


@pytest.mark.parametrize(("kind", "formula"), CASES)
def test_it_learns_to_tell_pairs_apart(kind: type, formula) -> None:
    loss = kind()
    image, text = (t.requires_grad_() for t in features(6))
    optimizer = torch.optim.Adam([image, text, *loss.parameters()], 0.1)
    first = loss(image, text)
    for _ in range(30):
        optimizer.zero_grad()
        value = loss(image, text)
        value.backward()
        optimizer.step()
    assert value < 0.2 * first


def test_the_scale_is_kept_in_bounds() -> None:
    loss = ClipLoss()
    assert loss.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    image, text = features(6)
    for start, bound in ((7.0, 100.0), (-3.0, 1.0)):
        results = []
        for value in (start, math.log(bound)):
            torch.nn.init.constant_(loss.logit_scale, value)
            results.append(loss(image, text).item())
        assert results[0] == pytest.approx(results[1], rel=1e-5)
    # a descent step goes against the gradient: outside of the bounds only what leads back passes
    for start, slope, passes in ((7.0, 1.0, True), (7.0, -1.0, False), (-3.0, 1.0, False), (-3.0, -1.0, True),
                                 (2.0, 1.0, True), (2.0, -1.0, True)):  # fmt: skip
        x = torch.tensor(start, requires_grad=True)
        (grad,) = torch.autograd.grad(slope * _Bounded.apply(x, 0.0, 4.0), x)
        assert grad.item() == (slope if passes else 0.0)
    torch.nn.init.constant_(loss.logit_scale, 7.0)
    (grad,) = torch.autograd.grad(loss(image, text.flip(0)), loss.logit_scale)
    assert grad > 0  # wrong pairs bring the scale down again
    siglip = SiglipLoss()
    assert siglip.logit_scale.exp().item() == pytest.approx(10)
    assert siglip.logit_bias.item() == -10


@pytest.mark.parametrize("kind", [ClipLoss, SiglipLoss])
def test_bfloat16_features_and_a_frozen_tower(kind: type) -> None:
    loss, (image, text) = kind(), features(5)
    expected = loss(image, text)
    half = text.bfloat16().requires_grad_()
    value = loss(image.bfloat16(), half)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0.05, atol=0.05)
    value.backward()
    assert half.grad.abs().max() > 0


@pytest.mark.parametrize("kind", [ClipLoss, SiglipLoss])
def test_bad_features_are_refused(kind: type) -> None:
    image, text = features(4)
    for a, b in ((image, text[:3]), (image[0], text[0]), (image[:0], text[:0]), (image, text.double())):
        with pytest.raises(ValueError, match=kind.__name__):
            kind()(a, b)


def test_two_ranks_equal_one_process_with_the_whole_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    n, world = 3, 2
    clip, siglip = ClipLoss(0.2), SiglipLoss(0.3, -1.0)
    data = {
        "n": n, "x": torch.randn(n * world, 5).double(), "y": torch.randn(n * world, 6).double(),
        "image_tower": torch.randn(5, 8).double(), "text_tower": torch.randn(6, 8).double(),
        "clip": clip.state_dict(), "siglip": siglip.state_dict(),
    }  # fmt: skip
    torch.save(data, tmp_path / "batch.pt")
    results = ranks.results("contrastive_rank.py", world, tmp_path)
    for name, loss, formula in (("clip", clip, clip_formula), ("siglip", siglip, siglip_formula)):
        towers = [data[key].clone().requires_grad_() for key in ("image_tower", "text_tower")]
        inputs = [*towers, *parameters(loss)]
        value = formula(data["x"] @ towers[0], data["y"] @ towers[1], *inputs[2:])
        expected = torch.autograd.grad(value, inputs)
        torch.testing.assert_close(sum(result[name][0] for result in results) / world, value)
        for got, want in zip(zip(*(result[name][1] for result in results), strict=True), expected, strict=True):
            torch.testing.assert_close(sum(got) / world, want)  # as DDP and ZeRO average them
            if want.dim():
                assert (got[0] - got[1]).abs().max() > 1e-6  # a rank alone has another gradient
