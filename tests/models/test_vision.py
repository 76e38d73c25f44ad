"""The vision transformer against transformers' towers for the same weights, any layer, any size, packed or not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_towers import TOWERS, assert_gradients, assert_near, normalise, pixels, shake, tiny_tower
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from fastmllm.models.vision import VisionConfig, VisionTransformer  # noqa: E402
from fastmllm.models.weights.mapping import to_ours  # noqa: E402
from fastmllm.models.weights.towers import family_of, read_tower  # noqa: E402

TINY = VisionConfig(width=32, depth=3, num_heads=4, mlp_ratio=2, patch_size=4, image_size=16)


def ours(reference: nn.Module, **changes: Any) -> VisionTransformer:
    return read_tower(reference.config.to_dict(), reference.state_dict(), "the oracle", changes=changes)


def their_gradients(reference: nn.Module, model: VisionTransformer) -> dict[str, Tensor]:
    """Return the oracle's gradients under our names; zeros where a part of a joined tensor has none."""
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in reference.named_parameters()}
    assert model.source is not None
    family = family_of(model.source.kind, "the oracle")
    translated, _ = to_ours(grads, family.rules(model.config), "the oracle", family.unused(model.config))
    return {name: grad for name, grad in translated.items() if name in dict(model.named_parameters())}


def run(reference: nn.Module, x: Tensor, resample: bool) -> Any:
    always = isinstance(reference, (transformers.InternVLVisionModel, transformers.Dinov2Model))
    extra = {} if always or not resample else {"interpolate_pos_encoding": True}
    return reference(x, output_hidden_states=True, **extra)


# native; larger; not square; as many patches as native but not square
@pytest.mark.parametrize("size", [(16, 16), (24, 24), (12, 28), (8, 32)])
@pytest.mark.parametrize("family", TOWERS)
def test_equals_transformers_forward_and_backward(family: str, size: tuple[int, int]) -> None:
    reference = tiny_tower(family)
    model = ours(reference)
    x = pixels(2, *size)
    y = model.forward_tokens(x)
    expected = run(reference, normalise(x, model.config), size != (16, 16)).last_hidden_state
    assert_near(y, expected)
    assert_near(model(x), expected[:, int(model.config.cls_token) :])

    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    assert_gradients(model, their_gradients(reference, model))


@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize("layer", [-2, 1, 0, -1])
def test_any_hidden_layer_without_the_blocks_behind_it(family: str, layer: int) -> None:
    reference = tiny_tower(family)
    model = ours(reference, layer=layer, final_norm=False)
    x = pixels(2, 16, 16)
    hidden = run(reference, normalise(x, model.config), False).hidden_states
    assert len(hidden) == 4
    assert len(model.blocks) == layer % 4
    y = model.forward_tokens(x)
    assert_near(y, hidden[layer])
    y.square().sum().backward()
    hidden[layer].square().sum().backward()
    assert_gradients(model, their_gradients(reference, model))


@pytest.mark.parametrize("layer", [(-2, -3, 1), (0, -1)])
def test_several_layers_are_joined_in_the_order_named(layer: tuple[int, ...]) -> None:
    reference = tiny_tower("clip")
    model = ours(reference, layer=layer)
    x = pixels(2, 16, 16)
    hidden = run(reference, normalise(x, model.config), False).hidden_states
    expected = torch.cat([hidden[k][:, 1:] for k in layer], -1)  # as VipLlava and Mllama take them
    assert model.width == 32 * len(layer)
    assert_near(model(x), expected)
    model(x).square().sum().backward()
    expected.square().sum().backward()
    assert_gradients(model, their_gradients(reference, model))


def test_equals_the_vision_tower_of_idefics() -> None:
    from transformers.models.idefics.vision import IdeficsVisionTransformer

    config = transformers.models.idefics.configuration_idefics.IdeficsVisionConfig(
        embed_dim=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4, patch_size=4, image_size=16
    )
    config._attn_implementation = "eager"
    reference = shake(IdeficsVisionTransformer(config))
    model = ours(reference)
    x = pixels(2, 16, 16)
    y, expected = model.forward_tokens(x), reference(normalise(x, model.config)).last_hidden_state
    assert_near(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert_gradients(model, their_gradients(reference, model))
    # Idefics resamples with a scale of its own, (n + 0.1) / 4 patches, which nothing asks for: refused
    with pytest.raises(ValueError, match="16 x 16 pixels"):
        model(pixels(1, 24, 16))


def test_the_pooling_head_of_siglip() -> None:
    reference = tiny_tower("siglip")
    model = ours(reference, pool=True)
    x = pixels(3, 16, 16)
    y, expected = model.forward_pooled(x), reference(normalise(x, model.config)).pooler_output
    assert_near(y, expected)
    assert_near(model.forward_pooled(list(x)), expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert_gradients(model, their_gradients(reference, model))
    with pytest.raises(ValueError, match="pool=True"):
        ours(reference).forward_pooled(x)


SIZES = [(16, 16), (8, 20), (4, 4), (24, 12)]


@pytest.mark.parametrize("family", ["clip", "siglip", "internvl"])
def test_packed_equals_unpacked(family: str) -> None:
    model = ours(tiny_tower(family))
    images = [pixels(1, *size)[0] for size in SIZES]
    alone = torch.cat([model(image[None])[0] for image in images])
    alone.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    y = model.forward_packed(images)
    assert_near(y, alone, 1e-6)
    y.square().sum().backward()
    assert_gradients(model, grads)
    flat = torch.cat([image.permute(2, 0, 1).reshape(-1) for image in images])
    assert torch.equal(y, model.forward_packed(flat, [(h // 4, w // 4) for h, w in SIZES], layout="chw"))
    assert torch.equal(y, model.forward_packed(flat, [(1, h // 4, w // 4) for h, w in SIZES], layout="chw"))


def test_images_do_not_see_each_other() -> None:
    model = shake(VisionTransformer(TINY))
    images = [pixels(1, *size)[0] for size in SIZES]
    changed = [images[0], 255 - images[1], *images[2:]]
    before, after = model.forward_packed(images), model.forward_packed(changed)
    mine = slice(16, 26)  # patches of the second image
    assert torch.equal(before[:16], after[:16])
    assert torch.equal(before[26:], after[26:])
    assert (before[mine] - after[mine]).abs().max() > 1e-3
    x = pixels(3, 16, 16)
    assert_near(model(x), torch.cat([model(image[None]) for image in x]), 1e-6)


def test_no_image_at_all() -> None:
    model = shake(VisionTransformer(TINY))
    assert model(pixels(1, 16, 16)[:0]).shape == (0, 16, 32)
    y = model.forward_packed(torch.zeros(0, dtype=torch.uint8), [])
    assert y.shape == (0, 32)
    y.sum().backward()


def test_float_pixels_equal_uint8() -> None:
    model = shake(VisionTransformer(TINY))
    x = pixels(1, 16, 16)
    assert_near(model(x), model(x.float() / 255))


@pytest.mark.parametrize("family", TOWERS)
def test_bfloat16_follows_float32(family: str) -> None:
    model = ours(tiny_tower(family))
    x = pixels(1, 24, 16)
    with torch.no_grad():
        expected = model(x)
        y = model.bfloat16()(x)
    assert y.dtype == torch.bfloat16
    assert_near(y, expected, 0.1)


def test_rejects_images_that_do_not_fit() -> None:
    model = VisionTransformer(TINY)
    with pytest.raises(ValueError, match="multiples of 4"):
        model(pixels(1, 18, 16))
    with pytest.raises(ValueError, match="grids"):
        model.forward_packed(torch.zeros(48, dtype=torch.uint8))


@pytest.mark.parametrize(
    "bad",
    [
        {"width": 30},
        {"layer": 13},
        {"layer": -14},
        {"layer": ()},
        {"layer": (1, 2)},
        {"activation": "relu"},
        {"resample": "nearest"},
        {"image_size": 13},
        {"image_size": 0},
        {"depth": 0},
        {"pool": True, "layer": 3},
        {"pool": True, "final_norm": False},
        {"post_norm": True},
    ],
)
def test_rejects_a_bad_config(bad: dict) -> None:
    with pytest.raises(ValueError, match="VisionConfig"):
        VisionConfig(**({"num_heads": 4} | bad))


def test_the_middle_of_the_mlp_is_exact() -> None:
    # 1408 * (6144 / 1408) is not 6144 in every rounding
    for width, inner in ((1408, 6144), (1152, 4304), (1792, 15360), (3200, 12800)):
        assert replace(TINY, width=width, num_heads=1, mlp_ratio=inner / width).mlp_width == inner
