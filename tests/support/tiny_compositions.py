"""Every composition that is allowed, tiny, with a batch of samples whose pictures have several sizes."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fastmllm.models.composition import RULES, ConnectorSizes, MLLMConfig, ResolutionSizes
from fastmllm.models.eva import EvaConfig
from fastmllm.models.language import LanguageConfig
from fastmllm.models.mllama_vision import MllamaVisionConfig
from fastmllm.models.mllm import MLLM
from fastmllm.models.qwen_vision import QwenVisionConfig
from fastmllm.models.vision import VisionConfig

IMAGE, VOCAB = 5, 64
LANGUAGE = LanguageConfig(
    vocab_size=VOCAB, width=32, depth=3, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=40, max_positions=512
)
MROPE = replace(LANGUAGE, mrope_section=(2, 3, 3))
ENCODERS: dict[str, Any] = {
    "vit": VisionConfig(width=16, depth=2, num_heads=2, mlp_ratio=2.0, patch_size=4, image_size=16),
    "qwen": QwenVisionConfig(
        width=16, depth=2, num_heads=2, mlp_width=20, out_width=32, patch_size=4, window=2, full_layers=(1,)
    ),
    "mllama": MllamaVisionConfig(
        width=16, depth=2, global_depth=1, num_heads=2, mlp_width=20, layers=(0,), tile_size=16, patch_size=4
    ),
}
HIGH = EvaConfig(width=16, depth=2, num_heads=2, mlp_width=20, patch_size=4, image_size=32, rope_grid=4, layer=2)
SIZES = ConnectorSizes(block=2, tokens=3, side=2, depth=2, num_heads=2, head_dim=8, width=16, mlp_width=24)
PIXELS = ResolutionSizes(max_tiles=2, min_pixels=64, max_pixels=600)


def allowed() -> list[tuple[str, str, str, str]]:
    """Return (encoder, resolution, connector, fusion) of all that the rules let pass."""
    found = []
    for resolution, encoders in RULES["resolution", "encoder"].items():
        for encoder in encoders:
            for connector in RULES["encoder", "connector"][encoder]:
                for fusion in RULES["resolution", "fusion"][resolution]:
                    fits = connector in RULES["fusion", "connector"][fusion]
                    if fits and connector in RULES["resolution", "connector"][resolution]:
                        found.append((encoder, resolution, connector, fusion))
    return found


def tiny(encoder: str, resolution: str, connector: str, fusion: str, **changes: Any) -> MLLMConfig:
    """Return a configuration of these parts; images in native grids come with M-RoPE."""
    parts: dict[str, Any] = {
        "encoder": ENCODERS[encoder], "language": MROPE if resolution == "native" else LANGUAGE,
        "image_token_id": IMAGE, "resolution": resolution, "connector": connector, "fusion": fusion,
        "connector_sizes": SIZES, "resolution_sizes": PIXELS, "cross_every": 2,
    }  # fmt: skip
    if connector == "token_packer":
        parts["encoder"] = replace(parts["encoder"], layer=(1, 2), final_norm=False)
    if fusion == "deepstack":
        parts["encoder"] = replace(parts["encoder"], deepstack_layers=(0,))
    if resolution == "dual":
        parts["high_res"] = HIGH
    return MLLMConfig(**{**parts, **changes})


@functools.cache
def redrawn(config: MLLMConfig, seed: int = 0) -> MLLM:
    """Return a model with weights so large that every part counts; gates, biases and positions are not 0."""
    model = MLLM.from_config(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            x = torch.randn(p.shape, generator=generator)
            if p.dim() <= 1:
                p.add_(x, alpha=0.3)
            else:
                p.copy_(0.7 * x / p.shape[-1] ** 0.5)
    return model.eval()


def picture(seed: int, height: int = 20, width: int = 28) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def samples(seed: int = 0) -> list[list[Any]]:
    """Return three samples: two pictures with text between, one behind text, and text alone."""
    a, b, c = (picture(3 * seed + k, *size) for k, size in enumerate(((20, 28), (24, 16), (16, 16))))
    return [[1, a, 10, 11, b, 12, 13], [1, 20, c, 21], [1, 30, 31]]


def labels(batch: list[list[Any]]) -> list[list[int]]:
    return [[item if isinstance(item, int) else -100 for item in s] for s in batch]
