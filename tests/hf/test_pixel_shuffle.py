"""Pixel shuffle of Idefics3, SmolVLM and InternVL."""

from __future__ import annotations

import pytest
import torch
from tiny_hf import draw
from tiny_hf_fusion import idefics3, smolvlm
from tiny_hf_llava import internvl

from fastmllm.hf import patch
from fastmllm.hf.fused.pixel_shuffle import PixelShuffle


@pytest.mark.parametrize("build", [idefics3, smolvlm])
@pytest.mark.parametrize("factor, side", [(2, 4), (3, 6), (4, 8), (1, 3)])
def test_equals_transformers(build, factor, side):
    connector = build().model.connector
    x = draw(3, 8, side * side).transpose(1, 2).requires_grad_()  # not contiguous
    dense = x.detach().contiguous().requires_grad_()  # transformers' own takes views
    expected = connector.pixel_shuffle(dense, factor)
    report = patch(connector, ops=["pixel_shuffle"])
    found = connector.pixel_shuffle(x, scale_factor=factor)
    assert torch.equal(found, expected)
    up = draw(*expected.shape, seed=3)
    assert torch.equal(torch.autograd.grad(found, x, up)[0], torch.autograd.grad(expected, dense, up)[0])
    assert report.replaced
    assert not report.fallbacks()


@pytest.mark.parametrize("tokens, factor", [(12, 2), (25, 2)])
def test_tokens_of_no_square_run_transformers(tokens, factor):
    connector = idefics3().model.connector
    assert "no square" in PixelShuffle.unsupported(connector, draw(1, tokens, 8), factor)
    report = patch(connector, ops=["pixel_shuffle"])
    with pytest.raises(RuntimeError):
        connector.pixel_shuffle(draw(1, tokens, 8), factor)
    assert len(report.fallbacks()[""]) == 1


@pytest.mark.parametrize("factor, grid", [(2, (4, 6)), (3, (6, 3))])
def test_a_grid_equals_internvls(factor, grid):
    model = internvl().model
    x = draw(2, *grid, 8).requires_grad_()
    expected = model.pixel_shuffle(x, scale_factor=1 / factor) if factor == 2 else None
    report = patch(model, ops=["pixel_shuffle"])
    found = model.pixel_shuffle(x, scale_factor=1 / factor)
    assert report.replaced
    if expected is None:  # 1 / 3 is no number of transformers' arithmetic
        assert found.shape == (2, grid[0] // factor, grid[1] // factor, 8 * factor**2)
        return
    assert not report.fallbacks()
    assert torch.equal(found, expected)
    up = draw(*expected.shape, seed=3)
    assert torch.equal(torch.autograd.grad(found, x, up)[0], torch.autograd.grad(expected, x, up)[0])


def test_an_odd_grid_runs_transformers():
    model = internvl().model
    report = patch(model, ops=["pixel_shuffle"])
    with pytest.raises(RuntimeError):
        model.pixel_shuffle(draw(1, 3, 4, 8))
    assert "whole blocks" in next(iter(report.fallbacks()[""]))
