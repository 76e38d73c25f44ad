"""Attention that stays transformers': over whole images or texts of one length, in one SDPA call for all of them."""

from __future__ import annotations

from torch import nn

WHY = "dense attention of all images is one SDPA call already"
DENSE = frozenset(
    {
        "Blip2Attention", "CLIPAttention", "Dinov2Attention", "Dinov2SelfAttention", "Dinov2WithRegistersAttention",
        "Dinov2WithRegistersSelfAttention", "Idefics2VisionAttention", "Idefics3VisionAttention",
        "IdeficsVisionAttention", "InstructBlipAttention", "InternVLVisionAttention", "MllamaVisionAttention",
        "Siglip2Attention", "SiglipAttention", "SmolVLMVisionAttention",
    }
)  # fmt: skip


def dense_attention(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return name and module of each dense attention of a tower, the inner one where one holds another."""

    def is_dense(module: nn.Module) -> bool:
        return type(module).__name__ in DENSE

    return [
        (name, module) for name, module in model.named_modules()
        if is_dense(module) and not any(part is not module and is_dense(part) for part in module.modules())
    ]  # fmt: skip
