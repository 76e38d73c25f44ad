"""What the tests of connectors with a formula of their own share: redrawn weights, comparison in fp64, packing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastmllm.models.weights.mapping import Rule, fill, to_ours, to_theirs

Formula = Callable[..., Tensor]  # a checkpoint's tensors, then one image's inputs (N, width) and its (h, w)


def redrawn(module: nn.Module) -> nn.Module:
    torch.manual_seed(4)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def checkpoint(module: nn.Module, rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Write the weights under the checkpoint's names, and check that they come back bit for bit."""
    theirs = to_theirs(module.state_dict(keep_vars=True), rules)
    ours, rest = to_ours(theirs, rules, "test")
    assert not rest
    assert all(torch.equal(ours[name], value) for name, value in module.state_dict().items())
    fill(module, {name: value.detach().clone().requires_grad_() for name, value in ours.items()}, "test")
    return to_theirs(dict(module.named_parameters()), rules)


def assert_equals_formula(
    module: nn.Module, rules: Sequence[Rule], formula: Formula, widths: Sequence[int], grids: Sequence[tuple[int, int]]
) -> None:
    """Compare values and all gradients with the formula, image by image: fp32 within 1e-5, fp64 to rounding."""
    for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        module = redrawn(module).to(dtype)
        tensors = checkpoint(module, rules)
        sizes = [h * w for h, w in grids]
        inputs = [torch.randn(sum(sizes), width, dtype=dtype, requires_grad=True) for width in widths]
        parts = zip(*(x.split(sizes) for x in inputs), strict=True)
        y = module(*inputs, list(grids))
        expected = torch.cat([formula(tensors, *images, grid) for images, grid in zip(parts, grids, strict=True)])
        assert (y - expected).abs().max() <= close * expected.abs().max()
        seed = torch.randn_like(y)
        wanted = [*inputs, *module.parameters()]
        got, want = (torch.autograd.grad([t], wanted, [seed], retain_graph=True) for t in (y, expected))
        largest = max(g.abs().max() for g in want)
        for a, b in zip(got, want, strict=True):
            assert (a - b).abs().max() <= 10 * close * largest
            assert b.any()


def assert_packs(module: nn.Module, widths: Sequence[int], grids: Sequence[tuple[int, int]]) -> None:
    """Check that packed equals image by image, a batch equals packed, and neighbours do not move a bit."""
    module = redrawn(module).float()
    sizes = [h * w for h, w in grids]
    inputs = [torch.randn(sum(sizes), width) for width in widths]
    images = list(zip(*(x.split(sizes) for x in inputs), strict=True))
    y = module(*inputs, list(grids))
    alone = [module(*image, [grid]) for image, grid in zip(images, grids, strict=True)]
    torch.testing.assert_close(y, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert [len(t) for t in alone] == [module.num_tokens(h, w) for h, w in grids]
    others = [x.clone() for x in inputs]
    for x in others:
        x[sizes[0] :] += 1.0
    moved = module(*others, list(grids))
    assert torch.equal(moved[: len(alone[0])], y[: len(alone[0])])
    assert not torch.equal(moved, y)

    (h, w), batch = grids[0], [torch.stack([image, image * 2]) for image in images[0]]
    flat = module(*(x.flatten(0, 1) for x in batch), [(2, h, w)])
    assert torch.equal(module(*batch, [(h, w)]).flatten(0, 1), flat)
    if h == w:
        assert torch.equal(module(*batch).flatten(0, 1), flat)
    none = [torch.zeros(0, width) for width in widths]
    assert module(*none, []).shape == (0, y.shape[1])
    assert module(*(x.view(0, h * w, x.shape[1]) for x in none), [(0, h, w)]).shape == (
        0,
        module.num_tokens(h, w),
        y.shape[1],
    )

    y = module(*batch, [(h, w)])
    half = module.bfloat16()(*(x.bfloat16() for x in batch), [(h, w)])
    assert half.dtype == torch.bfloat16
    assert (half.float() - y).norm() < 0.1 * y.norm()
