"""Which family of transformers a composition is, if it is one: its config.json and its layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.data.resolution import AnyRes
from fastmllm.models.checkpoint import VISION, Layout
from fastmllm.models.composition import MLLMConfig
from fastmllm.models.families import build
from fastmllm.models.mllama_vision import MllamaVisionConfig
from fastmllm.models.mllm import Blueprint
from fastmllm.models.qwen_vision import QwenVisionConfig
from fastmllm.models.vision import VisionConfig
from fastmllm.models.weights.language import language_fields
from fastmllm.models.weights.tower_layouts import ACTIVATIONS
from fastmllm.models.weights.vision import describe

Raw = dict[str, Any]
_THEIRS = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
ARCHITECTURES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "idefics": "IdeficsForVisionText2Text",
    "mllama": "MllamaForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A family's way to write a composition.

    Args:
        raw: config.json.
        layout: of its checkpoints.
        spare: tensors that it has and the composition does not compute with, under our names.
    """

    raw: Raw
    layout: Layout
    spare: dict[str, Tensor]


def as_published(config: MLLMConfig, own: Blueprint) -> Published | None:
    """Find the family of transformers that a composition is.

    Args:
        config: the parts.
        own: built from them.

    Returns:
        None where no family computes exactly that: the same modules, sizes and constants.
    """
    for raw in _candidates(config, own):
        raw = {"architectures": [ARCHITECTURES[raw["model_type"]]], **raw}
        raw["tie_word_embeddings"] = config.language.tie_embeddings
        with suppress(ValueError), torch.device("meta"):
            found = build(raw, "this composition")
            if _facts(own, config) == _facts(found, config):
                return Published(raw=raw, layout=found.layout, spare=_spare(config, found.layout.whole))
    return None


def _facts(blueprint: Blueprint, config: MLLMConfig) -> list[Any]:
    """Return all that decides what a model computes."""
    facts: list[Any] = [getattr(blueprint.images, name, None) for name in ("policy", "skip")]
    for part in (blueprint.images, blueprint.language):
        facts += [(name, tuple(t.shape)) for name, t in part.state_dict().items()]
        facts += [
            (
                type(m),
                _plain(getattr(m, "config", None), config),
                *(getattr(m, n, None) for n in ("eps", "approximate")),
            )
            for m in part.modules()
        ]
    return facts


def _plain(value: object, config: MLLMConfig) -> object:
    """Leave out what an encoder's configuration says of blocks that are not built, of positions for other sizes than
    come, and of where LayerScale starts.
    """
    if not isinstance(value, VisionConfig):
        return value
    return replace(
        value, depth=value.num_blocks, layer=value.layers, mlp_ratio=value.mlp_width / value.width, pool=False,
        resample=value.resample if config.resolution == "native" else "none",
        layer_scale=None if value.layer_scale is None else 1.0,
    )  # fmt: skip


def _spare(config: MLLMConfig, whole: VisionConfig | None) -> dict[str, Tensor]:
    """Return the norm that CLIP and SigLIP have behind their last block, where it is not used: it changes nothing."""
    encoder = config.encoder
    if whole is None or not whole.final_norm or not isinstance(encoder, VisionConfig) or encoder.final_norm:
        return {}
    norm = nn.LayerNorm(encoder.width, device="cpu")
    return {f"{VISION}norm.{name}": t.detach() for name, t in norm.state_dict().items()}


def _candidates(config: MLLMConfig, own: Blueprint) -> Iterator[Raw]:
    """Yield what each family that has such parts would write in config.json."""
    encoder, parts = config.encoder, (config.resolution, config.connector, config.fusion)
    if isinstance(encoder, QwenVisionConfig) and config.fusion in ("tokens", "deepstack"):
        yield from _qwen(config, encoder)
    if isinstance(encoder, MllamaVisionConfig) and config.fusion == "mllama":
        yield from _mllama(config, encoder)
    if not isinstance(encoder, VisionConfig):
        return
    if config.fusion == "idefics" and config.resolution == "fixed" and config.connector in ("resampler", "none"):
        yield from _idefics(config, encoder)
    if parts not in (("fixed", "mlp", "tokens"), ("anyres", "mlp", "tokens"), ("tiles", "pixel_shuffle", "tokens")):
        return
    with suppress(ValueError):
        shared: Raw = {"text_config": language_fields(config.language), "image_token_id": config.image_token_id}
        wanted = [k - encoder.num_blocks - 1 for k in encoder.layers]
        layer = wanted[0] if len(wanted) == 1 else wanted
        for norm in (encoder.final_norm, True):
            with suppress(ValueError):
                tower = {**describe(replace(encoder, final_norm=norm)).raw}
                raw = {**shared, "vision_config": tower, "vision_feature_layer": layer}
                if config.resolution == "tiles":
                    each = (encoder.image_size // encoder.patch_size // config.connector_sizes.block) ** 2
                    ratio = 1 / config.connector_sizes.block
                    yield {"model_type": "internvl", **raw, "downsample_ratio": ratio, "image_seq_length": each}
                    continue
                strategy = "default" if encoder.cls_token else "full"  # the first row is the class token's, or none's
                raw |= {"image_token_index": config.image_token_id, "vision_feature_select_strategy": strategy}
                yield from _llava(config, own, raw, encoder)


def _llava(config: MLLMConfig, own: Blueprint, raw: Raw, encoder: VisionConfig) -> Iterator[Raw]:
    if config.resolution == "fixed":
        each = (encoder.image_size // encoder.patch_size) ** 2
        yield {"model_type": "llava", **raw, "image_seq_length": each}
        return
    policy = getattr(own.images, "policy", None)
    assert isinstance(policy, AnyRes)
    raw = {**raw, "image_grid_pinpoints": [list(p) for p in policy.pinpoints]}
    if policy.max_tiles is None:
        yield {"model_type": "llava_next", **raw}
    elif not encoder.cls_token:
        yield {"model_type": "llava_onevision", **raw, "vision_aspect_ratio": f"anyres_max_{policy.max_tiles}"}


def _idefics(config: MLLMConfig, encoder: VisionConfig) -> Iterator[Raw]:
    sizes, places = config.connector_sizes, config.places
    with suppress(ValueError):
        yield {
            **language_fields(config.language, "idefics"),
            "additional_vocab_size": 0,
            "cross_layer_interval": places[1] if len(places) > 1 else config.language.depth,
            "qk_layer_norms": False,
            "use_resampler": config.connector == "resampler",
            "perceiver_config": {
                "use_resampler": config.connector == "resampler", "resampler_n_latents": sizes.tokens,
                "resampler_depth": sizes.depth, "resampler_n_heads": sizes.num_heads,
                "resampler_head_dim": sizes.head_dim, "qk_layer_norms_perceiver": False,
            },
            "vision_config": {
                "embed_dim": encoder.width, "image_size": encoder.image_size, "patch_size": encoder.patch_size,
                "intermediate_size": encoder.mlp_width, "num_hidden_layers": encoder.num_blocks,
                "num_attention_heads": encoder.num_heads, "hidden_act": _THEIRS[encoder.activation],
                "layer_norm_eps": encoder.norm_eps,
            },
        }  # fmt: skip


def _mllama(config: MLLMConfig, encoder: MllamaVisionConfig) -> Iterator[Raw]:
    with suppress(ValueError):
        text = language_fields(config.language, "mllama_text_model")
        text["num_hidden_layers"] += len(config.places)  # theirs count the cross layers among the others
        text["pad_token_id"] = None  # the default is 128004, which a small vocabulary lacks
        text["cross_attention_layers"] = [place + k for k, place in enumerate(config.places)]
        yield {
            "model_type": "mllama",
            "text_config": text,
            "image_token_index": config.image_token_id,
            "vision_config": {
                "hidden_size": encoder.width, "num_hidden_layers": encoder.depth,
                "num_global_layers": encoder.global_depth, "attention_heads": encoder.num_heads,
                "intermediate_size": encoder.mlp_width, "intermediate_layers_indices": list(encoder.layers),
                "vision_output_dim": encoder.out_width, "image_size": encoder.tile_size,
                "patch_size": encoder.patch_size, "num_channels": encoder.channels, "max_num_tiles": encoder.max_tiles,
                "supported_aspect_ratios": [list(ratio) for ratio in encoder.aspect_ratios],
                "hidden_act": _THEIRS[encoder.activation], "norm_eps": encoder.norm_eps,
            },
        }  # fmt: skip


def _qwen(config: MLLMConfig, encoder: QwenVisionConfig) -> Iterator[Raw]:
    shared = {
        "depth": encoder.depth, "num_heads": encoder.num_heads, "patch_size": encoder.patch_size,
        "temporal_patch_size": encoder.temporal_patch_size, "spatial_merge_size": encoder.merge_size,
        "in_channels": encoder.channels, "hidden_act": _THEIRS.get(encoder.activation, encoder.activation),
    }  # fmt: skip
    sizes = {
        "hidden_size": encoder.width, "intermediate_size": encoder.mlp_width, "out_hidden_size": encoder.out_width,
    }  # fmt: skip
    towers: dict[str, Raw] = {
        "qwen2_vl": {
            "embed_dim": encoder.width, "mlp_ratio": encoder.mlp_width // encoder.width,
            "hidden_size": encoder.out_width,
        },
        "qwen2_5_vl": {
            **sizes, "window_size": (encoder.window or 0) * encoder.merge_size * encoder.patch_size,
            "fullatt_block_indexes": list(encoder.full_layers),
        },
        "qwen3_vl": {
            **sizes, "num_position_embeddings": (encoder.position_grid or 0) ** 2,
            "deepstack_visual_indexes": list(encoder.deepstack_layers),
        },
    }  # fmt: skip
    for kind, tower in towers.items():
        with suppress(ValueError):
            text = language_fields(config.language, f"{kind}_text")
            yield {
                "model_type": kind,
                "text_config": text,
                "vision_config": {"model_type": kind, **shared, **tower},
                "image_token_id": config.image_token_id,
            }
