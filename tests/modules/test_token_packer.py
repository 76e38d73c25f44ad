"""TokenPacker against its formula in fp64, region by region."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from connector_checks import assert_equals_formula, assert_packs
from torch import Tensor

from fastmllm.models.weights.connectors import TOKEN_PACKER_RULES
from fastmllm.modules.token_packer import TokenPacker

HEADS = 2


def formula(t: dict[str, Tensor], x: Tensor, fine: Tensor, grid: tuple[int, int], region: int = 2) -> Tensor:
    """Each bilinear coarse token attends to the region x region fine tokens that it stands for; MLP behind."""
    t = {name.removeprefix("mm_projector."): value for name, value in t.items()}

    def mlp(name: str, y: Tensor) -> Tensor:
        y = F.gelu(F.linear(y, t[f"{name}.0.weight"], t[f"{name}.0.bias"]))
        return F.linear(y, t[f"{name}.2.weight"], t[f"{name}.2.bias"])

    def norm(name: str, y: Tensor) -> Tensor:
        return F.layer_norm(y, y.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], 1e-6)

    rows, columns = grid[0] // region, grid[1] // region
    coarse = F.interpolate(x.t().unflatten(1, grid)[None], (rows, columns), mode="bilinear")[0].permute(1, 2, 0)
    query = norm("ln_q_1", F.linear(coarse, t["q_proj_1.weight"]))  # (rows, columns, D)
    key = norm("ln_k_1", mlp("k_proj_1", fine)).unflatten(0, grid)
    value = norm("ln_v_1", mlp("v_proj_1", fine)).unflatten(0, grid)
    weights, biases = t["clip_attn.in_proj_weight"].chunk(3), t["clip_attn.in_proj_bias"].chunk(3)
    result = []
    for r in range(rows):
        for c in range(columns):
            cell = slice(r * region, (r + 1) * region), slice(c * region, (c + 1) * region)
            parts = query[r, c][None], key[cell].flatten(0, 1), value[cell].flatten(0, 1)
            q, k, v = (
                F.linear(part, w, b).unflatten(1, (HEADS, -1)).transpose(0, 1)
                for part, w, b in zip(parts, weights, biases, strict=True)
            )
            y = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v  # (H, 1, Dh)
            result.append(F.linear(y.flatten(), t["clip_attn.out_proj.weight"], t["clip_attn.out_proj.bias"]))
    return mlp("mlp", torch.stack(result))


def build(region: int = 2) -> TokenPacker:
    return TokenPacker(6, 10, levels=3, width=8, head_dim=8 // HEADS, region=region)


def test_equals_the_formula() -> None:
    assert_equals_formula(build(), TOKEN_PACKER_RULES, formula, [6, 18], [(4, 4), (2, 6), (2, 6), (4, 2)])


def test_equals_the_formula_with_regions_of_three() -> None:
    def of_three(*inputs: Tensor) -> Tensor:
        return formula(*inputs, region=3)

    assert_equals_formula(build(3), TOKEN_PACKER_RULES, of_three, [6, 18], [(3, 6), (6, 6)])


def test_packs() -> None:
    assert_packs(build(), [6, 18], [(4, 4), (2, 6), (4, 2)])


def test_a_region_is_seen_by_its_token_only() -> None:
    module = build()
    x, fine = torch.randn(16, 6), torch.randn(16, 18)
    y = module(x, fine, [(4, 4)])
    fine[5] += 1.0  # row 1, column 1
    assert (module(x, fine, [(4, 4)]) != y).any(1).tolist() == [True, False, False, False]


def test_published_sizes() -> None:
    with torch.device("meta"):
        module = TokenPacker(1024, 4096)
    assert (module.heads, module.num_tokens(24, 24)) == ((8, 128), 144)
    assert tuple(module.to_key.weight1.shape) == (1024, 4096)


def test_rejects_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="multiples of region 2"):
        build()(torch.randn(9, 6), torch.randn(9, 18), [(3, 3)])
    with pytest.raises(ValueError, match="differ in tokens"):
        build()(torch.randn(9, 6), torch.randn(8, 18), [(3, 3)])
    with pytest.raises(ValueError, match="head_dim=3"):
        TokenPacker(8, 8, head_dim=3)
