"""Published sizes: language models and vision towers by name, and the config.json that a family makes of two of them.

As far as config.json says sizes; those of the checkpoints of these names on the Hub.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastmllm.models.weights.folder import read_config

Raw = dict[str, Any]


def text(kind: str, vocab: int, width: int, mlp: int, depth: int, heads: int, kv_heads: int, **more: Any) -> Raw:
    """Return a text_config."""
    return {
        "model_type": kind, "vocab_size": vocab, "hidden_size": width, "intermediate_size": mlp,
        "num_hidden_layers": depth, "num_attention_heads": heads, "num_key_value_heads": kv_heads, **more,
    }  # fmt: skip


_TIED = {"tie_word_embeddings": True}
_QWEN2_5 = {"max_position_embeddings": 32768, "rope_theta": 1e6}
_QWEN3 = {"max_position_embeddings": 40960, "rope_theta": 1e6, "head_dim": 128}
_LLAMA3 = {"max_position_embeddings": 131072, "rope_theta": 5e5}
_SMOLLM2 = {"max_position_embeddings": 8192, "rope_theta": 1e5}

LANGUAGES: Mapping[str, Raw] = {
    "qwen2.5-0.5b": text("qwen2", 151936, 896, 4864, 24, 14, 2, **_QWEN2_5, **_TIED),
    "qwen2.5-1.5b": text("qwen2", 151936, 1536, 8960, 28, 12, 2, **_QWEN2_5, **_TIED),
    "qwen2.5-3b": text("qwen2", 151936, 2048, 11008, 36, 16, 2, **_QWEN2_5, **_TIED),
    "qwen2.5-7b": text("qwen2", 152064, 3584, 18944, 28, 28, 4, **_QWEN2_5),
    "qwen2.5-14b": text("qwen2", 152064, 5120, 13824, 48, 40, 8, **_QWEN2_5),
    "qwen2.5-32b": text("qwen2", 152064, 5120, 27648, 64, 40, 8, **_QWEN2_5),
    "qwen2.5-72b": text("qwen2", 152064, 8192, 29568, 80, 64, 8, **_QWEN2_5),
    "qwen3-0.6b": text("qwen3", 151936, 1024, 3072, 28, 16, 8, **_QWEN3, **_TIED),
    "qwen3-1.7b": text("qwen3", 151936, 2048, 6144, 28, 16, 8, **_QWEN3, **_TIED),
    "qwen3-4b": text("qwen3", 151936, 2560, 9728, 36, 32, 8, **_QWEN3, **_TIED),
    "qwen3-8b": text("qwen3", 151936, 4096, 12288, 36, 32, 8, **_QWEN3),
    "qwen3-14b": text("qwen3", 151936, 5120, 17408, 40, 40, 8, **_QWEN3),
    "qwen3-32b": text("qwen3", 151936, 5120, 25600, 64, 64, 8, **_QWEN3),
    "llama-3.2-1b": text("llama", 128256, 2048, 8192, 16, 32, 8, **_LLAMA3, **_TIED),
    "llama-3.2-3b": text("llama", 128256, 3072, 8192, 28, 24, 8, **_LLAMA3, **_TIED),
    "llama-3.1-8b": text("llama", 128256, 4096, 14336, 32, 32, 8, **_LLAMA3),
    "llama-3.1-70b": text("llama", 128256, 8192, 28672, 80, 64, 8, **_LLAMA3),
    "vicuna-7b": text("llama", 32000, 4096, 11008, 32, 32, 32, max_position_embeddings=4096),
    "vicuna-13b": text("llama", 32000, 5120, 13824, 40, 40, 40, max_position_embeddings=4096),
    "mistral-7b": text("mistral", 32768, 4096, 14336, 32, 32, 8, max_position_embeddings=32768, rope_theta=1e6,
                       sliding_window=None),
    "smollm2-135m": text("llama", 49152, 576, 1536, 30, 9, 3, **_SMOLLM2, **_TIED),
    "smollm2-360m": text("llama", 49152, 960, 2560, 32, 15, 5, **_SMOLLM2, **_TIED),
    "smollm2-1.7b": text("llama", 49152, 2048, 8192, 24, 32, 32, **_SMOLLM2, **_TIED),
}  # fmt: skip


def language_sizes(name: str | Path) -> Raw:
    """Return the text_config of a published language model, or of a folder.

    Raises:
        ValueError: neither of them.
    """
    known = LANGUAGES.get(str(name).lower())
    if known is not None:
        return known
    if not Path(name).is_dir():
        raise ValueError(f"plan: unknown llm {str(name)!r}; choose a folder with a config.json or one of "
                         f"{', '.join(LANGUAGES)}")  # fmt: skip
    raw = read_config(Path(name))
    inside: Raw = {**raw, **raw.get("text_config", {})}
    return {key: value for key, value in inside.items() if key != "text_config"}


# Towers ---------------------------------------------------------------------------------------------------------------
CLIP_L = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip
SIGLIP_SO = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
INTERN_300M = {
    "model_type": "internvl_vision", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True,
    "use_qk_norm": False, "norm_type": "layer_norm",
}  # fmt: skip


# Families: text_config -> config.json ---------------------------------------------------------------------------------
def llava(inside: Raw) -> Raw:
    """LLaVA-1.5."""
    return {"model_type": "llava", "image_token_index": 32000, "text_config": inside, "vision_config": CLIP_L,
            "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}  # fmt: skip


def llava_next(inside: Raw) -> Raw:
    """LLaVA-NeXT."""
    return {**llava(inside), "model_type": "llava_next"}


def llava_onevision(inside: Raw) -> Raw:
    """LLaVA-OneVision."""
    return {"model_type": "llava_onevision", "image_token_index": 151646, "vision_config": SIGLIP_SO,
            "text_config": inside, "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9"}  # fmt: skip


def internvl(inside: Raw) -> Raw:
    """InternVL 2.5 and 3 up to 8B."""
    tied = inside.get("tie_word_embeddings", False)
    return {"model_type": "internvl", "image_token_id": 151667, "vision_config": INTERN_300M, "text_config": inside,
            "downsample_ratio": 0.5, "tie_word_embeddings": tied}  # fmt: skip


def _mrope(inside: Raw, kind: str) -> Raw:
    """Turn a text model's heads by time, row and column: a quarter, three eighths and three eighths of each."""
    head = inside.get("head_dim", inside["hidden_size"] // inside["num_attention_heads"])
    plane = 3 * head // 16
    scaling = {"type": "mrope", "mrope_section": [head // 2 - 2 * plane, plane, plane]}
    theta = inside.get("rope_theta", 1e6)
    return {**inside, "model_type": kind, "head_dim": head, "rope_scaling": scaling, "rope_theta": theta}


def qwen2_vl(inside: Raw) -> Raw:
    """Qwen2-VL."""
    tower = {"depth": 32, "embed_dim": 1280, "hidden_size": inside["hidden_size"], "num_heads": 16, "mlp_ratio": 4,
             "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}  # fmt: skip
    return {"model_type": "qwen2_vl", "text_config": _mrope(inside, "qwen2_vl_text"), "vision_config": tower}


def qwen2_5_vl(inside: Raw) -> Raw:
    """Qwen2.5-VL."""
    tower = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": inside["hidden_size"],
             "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
             "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "hidden_act": "silu"}  # fmt: skip
    return {"model_type": "qwen2_5_vl", "text_config": _mrope(inside, "qwen2_5_vl_text"), "vision_config": tower}


def qwen3_vl(inside: Raw) -> Raw:
    """Qwen3-VL from 8B on."""
    tower = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": inside["hidden_size"],
             "num_heads": 16, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
             "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
             "hidden_act": "gelu_pytorch_tanh"}  # fmt: skip
    return {"model_type": "qwen3_vl", "text_config": _mrope(inside, "qwen3_vl_text"), "vision_config": tower}


def mllama(inside: Raw, crossing: Sequence[int] | None = None) -> Raw:
    """Llama-3.2-Vision.

    Args:
        inside: of the text model without layers that look across.
        crossing: numbers of those among all layers; None: one in front of each fourth.
    """
    tower = {"hidden_size": 1280, "num_hidden_layers": 32, "num_global_layers": 8, "attention_heads": 16,
             "intermediate_size": 5120, "intermediate_layers_indices": [3, 7, 15, 23, 30], "vision_output_dim": 7680,
             "image_size": 560, "patch_size": 14, "max_num_tiles": 4}  # fmt: skip
    own = inside["num_hidden_layers"]
    across = list(range(3, own + own // 4, 5)) if crossing is None else list(crossing)
    return {"model_type": "mllama", "image_token_index": inside["vocab_size"], "vision_config": tower,
            "text_config": {**inside, "model_type": "mllama_text_model", "num_hidden_layers": own + len(across),
                            "cross_attention_layers": across}}  # fmt: skip
