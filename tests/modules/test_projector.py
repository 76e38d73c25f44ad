"""The projector against LLaVA's and InternVL's formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastmllm.modules.projector import Projector, pixel_shuffle


def internvl_pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """Restate InternVL's two-step shuffle of (I, rows, columns, D), version v2."""
    images, rows, columns, width = x.shape
    x = x.reshape(images, rows, columns // factor, width * factor).permute(0, 2, 1, 3)
    x = x.reshape(images, columns // factor, rows // factor, width * factor * factor)
    return x.permute(0, 2, 1, 3)


def test_equals_llava_mlp() -> None:
    torch.manual_seed(0)
    module = Projector(12, 20)
    reference = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 20))
    reference[0].load_state_dict(module.fc1.state_dict())
    reference[2].load_state_dict(module.fc2.state_dict())
    x = torch.randn(2, 9, 12)
    torch.testing.assert_close(module(x), reference(x))
    assert module.num_tokens(3, 3) == 9


@pytest.mark.parametrize(("rows", "columns", "factor"), [(4, 4, 2), (2, 6, 2), (3, 6, 3), (2, 3, 1)])
def test_pixel_shuffle_equals_internvl(rows: int, columns: int, factor: int) -> None:
    x = torch.randn(2, rows * columns, 5)
    expected = internvl_pixel_shuffle(x.view(2, rows, columns, 5), factor).reshape(2, -1, 5 * factor * factor)
    assert torch.equal(pixel_shuffle(x, rows, columns, factor), expected)
    assert torch.equal(pixel_shuffle(x[0], rows, columns, factor), expected[0])


def test_shuffle_norm_and_hidden() -> None:
    torch.manual_seed(0)
    module = Projector(6, 10, hidden=7, shuffle=2, norm=True)
    x = torch.randn(3, 16, 6)
    y = module(x)
    assert y.shape == (3, 4, 10) == (3, module.num_tokens(4, 4), 10)
    torch.testing.assert_close(y, module(x, (4, 4)))
    assert not torch.equal(y, module(x, (8, 2)))
    shuffled = internvl_pixel_shuffle(x.view(3, 4, 4, 6), 2).reshape(3, 4, 24)
    normed = torch.nn.functional.layer_norm(shuffled, (24,))
    torch.testing.assert_close(y, module.fc2(torch.nn.functional.gelu(module.fc1(normed))))
    y.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_takes_a_view_of_the_patch_tokens() -> None:
    """The encoder hands over a view that skips the class token."""
    torch.manual_seed(0)
    module = Projector(6, 8, shuffle=2, norm=True)
    tokens = torch.randn(2, 5, 6)
    torch.testing.assert_close(module(tokens[:, 1:]), module(tokens[:, 1:].contiguous()))


def test_rejects_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="3 \\* 3"):
        pixel_shuffle(torch.randn(1, 9, 4), 3, 3, 2)
    with pytest.raises(ValueError, match="pixel_shuffle"):
        Projector(4, 4, shuffle=2)(torch.randn(1, 8, 4))
    with pytest.raises(ValueError, match="shuffle=0"):
        Projector(4, 4, shuffle=0)


def test_out_std_sets_the_scale_of_the_tokens():
    torch.manual_seed(0)
    out = Projector(8, 512, norm=True, out_std=0.14)(torch.randn(4, 8))
    assert out.std().item() == pytest.approx(0.14, rel=0.01)
