"""The C-Abstractor against its formula in fp64, on a checkpoint's convolutions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from connector_checks import assert_equals_formula, assert_packs, redrawn
from torch import Tensor

from fastmllm.models.weights.connectors import abstractor_rules
from fastmllm.modules.abstractor import CAbstractor

WIDTH_IN, WIDTH, SIDE, GRID, DEPTH = 8, 12, 2, 4, 2


def norm(t: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), t[f"{name}.weight"], t[f"{name}.bias"], 1e-5)
    return x.permute(0, 3, 1, 2)


def block(t: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """RegNet's Y bottleneck on (1, C, h, w): 1 x 1, depthwise 3 x 3, squeeze and excitation, 1 x 1, residual."""
    y = F.silu(norm(t, f"{name}.conv1.bn", F.conv2d(x, t[f"{name}.conv1.conv.weight"])))
    y = F.conv2d(y, t[f"{name}.conv2.conv.weight"], padding=1, groups=y.shape[1])
    y = F.silu(norm(t, f"{name}.conv2.bn", y))
    gate = F.silu(F.conv2d(y.mean((2, 3), keepdim=True), t[f"{name}.se.fc1.weight"], t[f"{name}.se.fc1.bias"]))
    y = y * F.conv2d(gate, t[f"{name}.se.fc2.weight"], t[f"{name}.se.fc2.bias"]).sigmoid()
    y = norm(t, f"{name}.conv3.bn", F.conv2d(y, t[f"{name}.conv3.conv.weight"]))
    if f"{name}.downsample.conv.weight" in t:
        x = norm(t, f"{name}.downsample.bn", F.conv2d(x, t[f"{name}.downsample.conv.weight"]))
    return F.silu(x + y)


def formula(t: dict[str, Tensor], x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Add positions; blocks; adaptive average to SIDE x SIDE; blocks; linear, SiLU, linear."""
    t = {name.removeprefix("abstractor."): value for name, value in t.items()}
    position = t["pos_emb"][0].t().unflatten(1, (GRID, GRID))[None]
    if grid != (GRID, GRID):
        position = F.interpolate(position, grid, mode="bilinear")
    y = x.t().unflatten(1, grid)[None] + position
    for k in range(DEPTH):
        y = block(t, f"net.0.b{k + 1}", y)
    y = F.adaptive_avg_pool2d(y, (SIDE, SIDE))
    for k in range(DEPTH):
        y = block(t, f"net.2.b{k + 1}", y)
    y = F.silu(F.linear(y[0].flatten(1).t(), t["readout.0.weight"], t["readout.0.bias"]))
    return F.linear(y, t["readout.2.weight"], t["readout.2.bias"])


def build(width: int = WIDTH) -> CAbstractor:
    return CAbstractor(WIDTH_IN, 10, width=width, depth=DEPTH, side=SIDE, grid=GRID)


@pytest.mark.parametrize("width", [WIDTH, WIDTH_IN])
def test_equals_the_formula(width: int) -> None:
    """With a projected shortcut in the first block, and where the widths agree without one."""
    rules = abstractor_rules(WIDTH_IN, width, GRID, DEPTH)
    assert_equals_formula(build(width), rules, formula, [WIDTH_IN], [(4, 4), (4, 4), (3, 5), (2, 6)])


def test_packs() -> None:
    assert_packs(build(), [WIDTH_IN], [(4, 4), (3, 5), (2, 2)])


def test_tokens_keep_their_place() -> None:
    """A pixel moves the token of its quarter more than the others."""
    module = redrawn(CAbstractor(WIDTH_IN, 10, width=8, depth=1, side=2, grid=8))
    x = torch.randn(64, WIDTH_IN)
    y = module(x, [(8, 8)])
    x[0] += 1.0
    moved = (module(x, [(8, 8)]) - y).norm(dim=1)
    assert moved.argmax() == 0
    assert (moved > 0).all()  # squeeze and excitation see the whole image


def test_published_sizes() -> None:
    with torch.device("meta"):
        module = CAbstractor(1024, 4096)
    assert module.num_tokens(24, 24) == 144
    assert sum(p.numel() for p in module.before.parameters()) == sum(p.numel() for p in module.behind.parameters())


def test_rejects_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="tokens"):
        build()(torch.randn(15, WIDTH_IN), [(4, 4)])
    with pytest.raises(ValueError, match="depth=0"):
        CAbstractor(8, 8, depth=0)
