"""Models without weights, on the meta device: published sizes by name, config.json folders, a recipe's own model.

Nothing is downloaded and no weight takes memory, so that a model of 90B parameters is there in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from fastmllm.data.resolution import Fixed, InternVL, Mllama, Native, Policy
from fastmllm.models.compose import blueprint
from fastmllm.models.composition import to_json
from fastmllm.models.families import build
from fastmllm.models.mllm import MLLM
from fastmllm.models.packing import Packing
from fastmllm.models.talk import TalkConfig, composition_of, said_packing
from fastmllm.models.vlm import VLM, ModelConfig, make_connector
from fastmllm.models.weights.folder import read_config
from fastmllm.models.weights.language import language_shape
from fastmllm.models.weights.vision import vision_shape

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Raw = dict[str, Any]


def _text(kind: str, vocab: int, width: int, mlp: int, depth: int, heads: int, kv_heads: int, **more: Any) -> Raw:
    return {
        "model_type": kind, "vocab_size": vocab, "hidden_size": width, "intermediate_size": mlp,
        "num_hidden_layers": depth, "num_attention_heads": heads, "num_key_value_heads": kv_heads, **more,
    }  # fmt: skip


_CLIP_L = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip
_SIGLIP_SO = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
_INTERN_300M = {
    "model_type": "internvl_vision", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True,
    "use_qk_norm": False, "norm_type": "layer_norm",
}  # fmt: skip
_MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_theta": 1e6}


def _llava(text: Raw) -> Raw:
    return {"model_type": "llava", "image_token_index": 32000, "text_config": text, "vision_config": _CLIP_L,
            "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}  # fmt: skip


def _qwen2(text: Raw) -> Raw:
    tower = {"depth": 32, "embed_dim": 1280, "hidden_size": text["hidden_size"], "num_heads": 16, "mlp_ratio": 4,
             "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}  # fmt: skip
    return {"model_type": "qwen2_vl", "text_config": text, "vision_config": tower}


def _qwen2_5(text: Raw) -> Raw:
    tower = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": text["hidden_size"],
             "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
             "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "hidden_act": "silu"}  # fmt: skip
    return {"model_type": "qwen2_5_vl", "text_config": text, "vision_config": tower}


def _mllama(text: Raw, crossing: list[int]) -> Raw:
    tower = {"hidden_size": 1280, "num_hidden_layers": 32, "num_global_layers": 8, "attention_heads": 16,
             "intermediate_size": 5120, "intermediate_layers_indices": [3, 7, 15, 23, 30], "vision_output_dim": 7680,
             "image_size": 560, "patch_size": 14, "max_num_tiles": 4}  # fmt: skip
    return {"model_type": "mllama", "image_token_index": 128256, "vision_config": tower,
            "text_config": {**text, "cross_attention_layers": crossing}}  # fmt: skip


# name -> config.json, as far as it says sizes: those of the checkpoints of these names on the Hub
PUBLISHED: Mapping[str, Raw] = {
    "llava-1.5-7b": _llava(_text("llama", 32064, 4096, 11008, 32, 32, 32)),
    "llava-1.5-13b": _llava(_text("llama", 32064, 5120, 13824, 40, 40, 40)),
    "llava-onevision-7b": {
        "model_type": "llava_onevision", "image_token_index": 151646, "vision_config": _SIGLIP_SO,
        "text_config": _text("qwen2", 152128, 3584, 18944, 28, 28, 4), "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
    },
    "internvl3-8b": {
        "model_type": "internvl", "image_token_id": 151667, "vision_config": _INTERN_300M,
        "text_config": _text("qwen2", 151674, 3584, 18944, 28, 28, 4), "downsample_ratio": 0.5,
        "tie_word_embeddings": False,
    },
    "qwen2-vl-7b": _qwen2(_text("qwen2_vl_text", 152064, 3584, 18944, 28, 28, 4, **_MROPE)),
    "qwen2-vl-72b": _qwen2(_text("qwen2_vl_text", 152064, 8192, 29568, 80, 64, 8, **_MROPE)),
    "qwen2.5-vl-7b": _qwen2_5(_text("qwen2_5_vl_text", 152064, 3584, 18944, 28, 28, 4, **_MROPE)),
    "qwen2.5-vl-72b": _qwen2_5(_text("qwen2_5_vl_text", 152064, 8192, 29568, 80, 64, 8, **_MROPE)),
    "llama-3.2-11b-vision": _mllama(
        _text("mllama_text_model", 128256, 4096, 14336, 40, 32, 8), list(range(3, 40, 5))
    ),
    "llama-3.2-90b-vision": _mllama(
        _text("mllama_text_model", 128256, 8192, 28672, 100, 64, 8), list(range(3, 100, 5))
    ),
}  # fmt: skip


def mllm_shape(name: str | Path) -> MLLM:
    """Build a published model without weights.

    Args:
        name: one of `PUBLISHED`, or a folder with a config.json of a family in `fastmllm.models.families`.

    Returns:
        The model on the meta device, with the resolution policy of its family's defaults.

    Raises:
        ValueError: no such name or folder, or a family whose pictures only its processor can take.
        FileNotFoundError: the folder has no config.json.
    """
    raw = PUBLISHED.get(str(name))
    if raw is None:
        if not Path(name).is_dir():
            raise ValueError(
                f"fastmllm::mllm_shape: {str(name)!r} is neither a folder with a config.json nor one of "
                f"{', '.join(PUBLISHED)}"
            )
        raw = read_config(Path(name))
    with torch.device("meta"):
        parts = build(raw, str(name))
        model = MLLM(parts, raw)
    if model.packing is None:
        token = parts.placeholders[0] if parts.placeholders else raw.get("image_token_index", 0)
        model.packing = Packing(policy=_policy(raw["model_type"], parts.images, str(name)), image_token=token)
    return model


def talk_shape(config: TalkConfig) -> MLLM:
    """Build a recipe's composition, or the model of its folder, without weights and without tokenizer.

    Raises:
        ValueError: as `mllm_shape`, an unknown name of a part, or parts that do not go together.
    """
    if config.folder:
        model = mllm_shape(config.folder)
        if config.resolution:
            model.packing = said_packing(config, model)
        return model
    with torch.device("meta"):
        vision = vision_shape(config.vision) if config.vision else None
        language = language_shape(config.language) if config.language else None
        made = composition_of(config, vision, language)
        return MLLM(blueprint(made), {"model_type": "fastmllm", **to_json(made)})


def vlm_shape(config: ModelConfig) -> VLM:
    """Build a recipe's model without weights and without tokenizer, in the dtype that the recipe means here.

    Raises:
        ValueError: an unknown name. Folders need their config.json only.
    """
    dtype = config.torch_dtype()
    with torch.device("meta"):
        language, vision = language_shape(config.language).to(dtype), vision_shape(config.vision).to(dtype)
        connector = make_connector(config, vision.width, language.config.width, 1.0).to(dtype)
        model = VLM(vision, connector, language, config, cast("Tokenizer", None))  # it has no weights
    model.requires_grad_(False)
    return model


def _policy(kind: str, images: Any, origin: str) -> Policy:
    """Return the resolution policy of a family, with the defaults of its checkpoints' preprocessors."""
    size = images.vision.config
    match kind:
        case "llava" | "idefics":
            return Fixed(image_size=size.image_size, patch_size=size.patch_size, cross=kind == "idefics")
        case "llava_next" | "llava_onevision":
            return images.policy
        case "internvl":
            return InternVL(image_size=size.image_size, patch_size=size.patch_size)
        case "mllama":
            return Mllama(image_size=size.tile_size, patch_size=size.patch_size, max_tiles=size.max_tiles)
        case "qwen2_vl" | "qwen2_5_vl" | "qwen3_vl":
            return Native(
                patch_size=size.patch_size, merge_size=size.merge_size, temporal_patch_size=size.temporal_patch_size
            )  # fmt: skip
    raise ValueError(f"fastmllm::mllm_shape: {origin}: pictures of {kind!r} come through its processor only")
