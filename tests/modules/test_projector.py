"""The connectors against transformers' LLaVA, VipLLaVA, InternVL and Idefics3, and nanoVLM's formula."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from oracle import gradients
from torch import Tensor, nn
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.vipllava.modeling_vipllava import VipLlavaMultiModalProjector

from fastmllm.models.weights.connectors import read_projector
from fastmllm.models.weights.mapping import fill, to_ours, to_theirs
from fastmllm.modules.gelu_mlp import GeluMLP
from fastmllm.modules.projector import Projector, ShuffleProjector

VISION, TEXT = 12, 20


def config(**fields: object) -> SimpleNamespace:
    """What the oracles read of a configuration."""
    parts = {"vision_config": SimpleNamespace(hidden_size=VISION), "text_config": SimpleNamespace(hidden_size=TEXT)}
    return SimpleNamespace(**parts, **fields)


def redraw(module: nn.Module) -> None:
    torch.manual_seed(3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)


def loaded(oracle: nn.Module, raw: dict, name: str) -> Projector | ShuffleProjector:
    """Load the oracle's weights, and check that they go back bit for bit."""
    redraw(oracle)
    module, rules = read_projector(raw, VISION, TEXT)
    theirs = {f"{name}.{key}": value for key, value in oracle.state_dict().items()}
    ours, rest = to_ours(theirs, rules, "test")
    assert not rest
    fill(module, ours, "test")
    back = to_theirs(module.state_dict(), rules)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], value) for key, value in theirs.items())
    return module


def assert_equal(module: nn.Module, y: Tensor, oracle: nn.Module, expected: Tensor, x: Tensor) -> None:
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()
    seed = torch.randn_like(expected)
    mine = [p for _, p in sorted(module.named_parameters())]
    got = gradients([y], [x, *mine], [seed])
    want = gradients([expected], [x, *oracle.parameters()], [seed])
    largest = max(g.abs().max().item() for g in want)
    assert (got[0] - want[0]).abs().max() <= 1e-4 * largest
    norms = sorted(g.double().norm().item() for g in got), sorted(g.double().norm().item() for g in want)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize(
    ("act", "bias", "layers"), [("gelu", True, 1), ("gelu_pytorch_tanh", False, 1), ("gelu", True, 3)]
)
def test_equals_llava(act: str, bias: bool, layers: int) -> None:
    layer = [-2, -3, 1][:layers] if layers > 1 else -2
    raw = {"model_type": "llava", "projector_hidden_act": act, "multimodal_projector_bias": bias}
    raw["vision_feature_layer"] = layer
    fields = {key: value for key, value in raw.items() if key != "model_type"}
    oracle = LlavaMultiModalProjector(config(**fields))
    module = loaded(oracle, raw, "multi_modal_projector")
    x = torch.randn(2, 9, VISION * layers, requires_grad=True)
    assert_equal(module, module(x), oracle, oracle(x), x)
    assert module.num_tokens(3, 3) == 9


def test_equals_vipllava_with_its_defaults() -> None:
    oracle = VipLlavaMultiModalProjector(
        config(vision_feature_layer=(-2, -5, -8, -11, 6), projector_layernorm_eps=1e-5, projector_hidden_act="gelu")
    )
    module = loaded(oracle, {"model_type": "vipllava"}, "multi_modal_projector")
    x = torch.randn(7, 5 * VISION, requires_grad=True)
    assert_equal(module, module(x), oracle, oracle(x), x)


@pytest.mark.parametrize(("ratio", "side"), [(0.5, 4), (0.25, 8)])
def test_equals_internvl_with_its_shuffle(ratio: float, side: int) -> None:
    oracle = InternVLMultiModalProjector(config(downsample_ratio=ratio, projector_hidden_act="gelu"))
    module = loaded(oracle, {"model_type": "internvl", "downsample_ratio": ratio}, "multi_modal_projector")
    x = torch.randn(3, side * side, VISION, requires_grad=True)
    shuffled = InternVLModel.pixel_shuffle(None, x.view(3, side, side, VISION), ratio)
    expected = oracle(shuffled.flatten(1, 2))
    assert_equal(module, module(x), oracle, expected, x)
    packed = module(x.flatten(0, 1), [(side, side)] * 3)
    assert torch.equal(packed.view_as(expected), module(x))


@pytest.mark.parametrize(("kind", "factor"), [("idefics3", 2), ("smolvlm", 4)])
def test_equals_idefics3(kind: str, factor: int) -> None:
    oracle = Idefics3Connector(config(scale_factor=factor))
    module = loaded(oracle, {"model_type": kind, "scale_factor": factor}, "connector")
    x = torch.randn(2, 64, VISION, requires_grad=True)
    assert_equal(module, module(x), oracle, oracle(x), x)
    assert module.num_tokens(8, 8) == 64 // factor**2


def test_equals_nanovlm() -> None:
    """Blocks of 4 x 4 tokens, row by row inside a block, then one matrix."""
    module, rules = read_projector({"model_type": "nanovlm"}, VISION, TEXT)
    weight = torch.randn(TEXT, 16 * VISION)
    fill(module, to_ours({"MP.proj.weight": weight}, rules, "test")[0], "test")
    x = torch.randn(2, 8, 8, VISION)
    blocks = [x[:, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].flatten(1) for r in range(2) for c in range(2)]
    torch.testing.assert_close(module(x.flatten(1, 2)), torch.stack(blocks, 1) @ weight.t(), rtol=1e-5, atol=1e-5)


def test_packed_grids_of_other_shapes_do_not_touch_each_other() -> None:
    torch.manual_seed(0)
    module = Projector(6, 10, hidden=7, shuffle=2, norm=True)
    x = torch.randn(8 + 16 + 12, 6)
    y = module(x, [(4, 2), (4, 4), (2, 6)])
    assert y.shape == (9, 10)
    torch.testing.assert_close(y[2:6], module(x[8:24], [(4, 4)]))
    other = torch.cat([x[:8] * 3, x[8:24], x[24:] + 1])
    assert torch.equal(module(other, [(4, 2), (4, 4), (2, 6)])[2:6], y[2:6])
    assert not torch.equal(y[:2], module(x[:8], [(2, 4)]))
    y.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert module(x[:0], []).shape == (0, 10)


def test_takes_a_view_of_the_patch_tokens() -> None:
    """The encoder hands over a view that skips the class token."""
    module = Projector(6, 8, shuffle=2, norm=True)
    tokens = torch.randn(2, 5, 6)
    torch.testing.assert_close(module(tokens[:, 1:]), module(tokens[:, 1:].contiguous()))


def test_bfloat16_follows_float32() -> None:
    module, x = Projector(16, 24, shuffle=2, norm=True), torch.randn(2, 16, 16)
    expected = module(x)
    y = module.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() < 0.03 * expected.norm()


def test_out_std_sets_the_scale_of_the_tokens() -> None:
    torch.manual_seed(0)
    out = Projector(8, 512, norm=True, out_std=0.14)(torch.randn(4, 8))
    assert out.std().item() == pytest.approx(0.14, rel=0.01)


def test_a_fresh_projector_is_drawn_as_nn_linear() -> None:
    module = Projector(64, 128)
    for parameter, fan_in in zip(module.mlp.parameters(), (64, 128, 64, 128), strict=True):
        assert 0.8 * fan_in**-0.5 < parameter.abs().max() <= fan_in**-0.5


def test_rejects_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="multiple of 2"):
        Projector(4, 4, shuffle=2)(torch.randn(1, 9, 4))
    with pytest.raises(ValueError, match="pixel_shuffle"):
        ShuffleProjector(4, 4)(torch.randn(8, 4), [(3, 3)])
    with pytest.raises(ValueError, match="shuffle=0"):
        Projector(4, 4, shuffle=0)
    with pytest.raises(ValueError, match="width_in=0"):
        ShuffleProjector(0, 4)
    with pytest.raises(ValueError, match="relu"):
        GeluMLP(4, 4, "relu")
    with pytest.raises(ValueError, match="projector_hidden_act 'silu'"):
        read_projector({"model_type": "llava", "projector_hidden_act": "silu"}, 4, 4)
    with pytest.raises(ValueError, match="model_type 'fuyu'"):
        read_projector({"model_type": "fuyu"}, 4, 4)
