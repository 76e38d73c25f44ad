"""Vision towers of transformers, of some thousand parameters and with every one of them at random; and comparisons."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 4,
    "image_size": 16, "attn_implementation": "eager",
}  # fmt: skip
# family -> transformers' names of its configuration and model, and what differs from SIZES (None: no such key)
TOWERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "clip": ("CLIPVisionConfig", "CLIPVisionModel", {}),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", {}),
    "dinov2": ("Dinov2Config", "Dinov2Model", {"intermediate_size": None, "mlp_ratio": 2}),
    "internvl": ("InternVLVisionConfig", "InternVLVisionModel", {"use_mask_token": True}),
    "internvl_6b": (
        "InternVLVisionConfig", "InternVLVisionModel",
        {"use_qk_norm": True, "norm_type": "rms_norm", "use_mean_pooling": False, "attention_bias": True},
    ),
    "blip2": ("Blip2VisionConfig", "Blip2VisionModel", {}),
    "instructblip": ("InstructBlipVisionConfig", "InstructBlipVisionModel", {"qkv_bias": False}),
}  # fmt: skip


def tiny_tower(family: str, **changes: Any) -> nn.Module:
    """Build transformers' tower of a family."""
    import transformers

    config, model, special = TOWERS[family]
    values = {key: value for key, value in (SIZES | special | changes).items() if value is not None}
    torch.manual_seed(0)
    return shake(getattr(transformers, model)(getattr(transformers, config)(**values)))


def shake(model: nn.Module) -> nn.Module:
    """Move every parameter: zero gates, unit norms and zero biases would hide errors."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def pixels(images: int, height: int, width: int) -> Tensor:
    """Draw (I, H, W, 3) uint8."""
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (images, height, width, 3), dtype=torch.uint8, generator=generator)


def normalise(x: Tensor, config: Any) -> Tensor:
    """Do what an image processor does; (I, 3, H, W) fp32."""
    x = (x.double() / 255 - torch.tensor(config.pixel_mean)) / torch.tensor(config.pixel_std)
    return x.float().permute(0, 3, 1, 2)


def assert_near(y: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Assert max |y - expected| <= tolerance * max |expected|."""
    assert y.shape == expected.shape, f"{tuple(y.shape)}, not {tuple(expected.shape)}"
    error = ((y.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
    assert error <= tolerance, f"relative error {error:.2e}"


def assert_gradients(model: nn.Module, expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Assert that all gradients are `expected`, relative to the largest one; where one has none, so has the other."""
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys(), sorted(got.keys() ^ expected.keys())
    largest = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in got.items():
        assert grad.shape == expected[name].shape, name
        error = (grad - expected[name]).abs().max().item() / largest
        assert error <= tolerance, f"{name}: {error:.2e}"
