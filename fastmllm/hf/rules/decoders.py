"""Language models: their gated MLPs with Liger's kernels; their norms go by structure."""

from __future__ import annotations

from fastmllm.hf.fused.liger import GatedMLP

# package under transformers.models -> its rules
PACKAGES = {
    "gemma": {"GemmaMLP": (GatedMLP,)},
    "gemma2": {"Gemma2MLP": (GatedMLP,)},
    "llama": {"LlamaMLP": (GatedMLP,)},
    "mistral": {"MistralMLP": (GatedMLP,)},
    "qwen2": {"Qwen2MLP": (GatedMLP,)},
    "qwen3": {"Qwen3MLP": (GatedMLP,)},
}
