from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_compositions import tiny

from fastmllm.models.compose import compose
from fastmllm.models.shapes import PUBLISHED, mllm_shape, vlm_shape
from fastmllm.models.vlm import ModelConfig
from fastmllm.models.weights.language import save_language
from fastmllm.models.weights.vision import save_vision, vision_shape

# billions of parameters, as the checkpoints' files hold them; LLaVA-1.5's last vision layer is not built here
BILLIONS = {
    "llava-1.5-7b": 7.063, "llava-1.5-13b": 13.351, "llava-onevision-7b": 8.030, "internvl3-8b": 7.944,
    "qwen2-vl-7b": 8.291, "qwen2-vl-72b": 73.406, "qwen2.5-vl-7b": 8.292, "qwen2.5-vl-72b": 73.406,
    "llama-3.2-11b-vision": 10.670, "llama-3.2-90b-vision": 88.593,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_size_and_no_weights(name: str) -> None:
    model = mllm_shape(name)
    assert sum(param.numel() for param in model.parameters()) == pytest.approx(1e9 * BILLIONS[name], rel=2e-3)
    assert all(param.is_meta for param in model.parameters())
    assert model.packing is not None


def test_a_folder_needs_its_config_only(tmp_path: Path) -> None:
    made = compose(tiny("vit", "fixed", "mlp", "tokens"))
    made.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    shape = mllm_shape(tmp_path)
    expected = {name: param.shape for name, param in made.named_parameters()}
    assert {name: param.shape for name, param in shape.named_parameters()} == expected


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither a folder with a config\.json nor one of llava-1\.5-7b"):
        mllm_shape("llava-1.5")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="gpt2"):
        mllm_shape(tmp_path)


def test_a_recipes_model_from_folders_without_weights(tmp_path: Path) -> None:
    made = compose(tiny("vit", "fixed", "mlp", "tokens"))
    save_vision(made.images.vision, tmp_path / "eye")
    save_language(made.language, tmp_path / "tongue")
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    config = ModelConfig(vision=str(tmp_path / "eye"), language=str(tmp_path / "tongue"), dtype="bfloat16")
    shape = vlm_shape(config)
    assert {param.dtype for param in shape.parameters()} == {torch.bfloat16}
    assert not any(param.requires_grad for param in shape.parameters())
    count = sum(param.numel() for param in shape.language.parameters())
    assert count == sum(param.numel() for param in made.language.parameters())
    width = made.language.config.width
    assert shape.connector(torch.empty(1, shape.vision.width, device="meta", dtype=torch.bfloat16)).shape == (1, width)


@pytest.mark.parametrize("vision", ["vit_tiny", "efficientnet_lite0", "dinov2_small"])
def test_a_named_encoder_has_the_shape_of_the_loaded_one(vision: str) -> None:
    from fastmllm.models.weights import load_vision

    with torch.device("meta"):
        shape = vision_shape(vision)
    try:
        loaded = load_vision(vision)
    except ImportError as error:
        pytest.skip(str(error))
    expected = {name: param.shape for name, param in loaded.named_parameters()}
    assert {name: param.shape for name, param in shape.named_parameters()} == expected


def test_an_unknown_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="neither one of dinov2_small"):
        vision_shape("no-such")
