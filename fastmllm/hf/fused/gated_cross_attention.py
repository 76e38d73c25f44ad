"""Tanh-gated cross-attention layers: gate and residual in one pass, and an image's keys and values made once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.hf.fusion import STATE, Fusion, plain
from fastmllm.kernels.gated_residual import gated_residual

KEPT = STATE + "kept"


class Kept:
    """What a projection made of one tensor, with marks of all that it was made of.

    It holds the result only as long as that tensor's memory lives, which is as long as `generate` passes on the images;
    a copy or a pickle of it is empty.
    """

    def __init__(self, marks: tuple[Any, ...] = (), source: Tensor | None = None, result: Tensor | None = None) -> None:
        self.marks, self.result, self.version = marks, result, None if result is None else result._version
        if source is not None:
            weakref.finalize(source.untyped_storage(), _clear, weakref.ref(self)).atexit = False

    def get(self, marks: tuple[Any, ...]) -> Tensor | None:
        """Return the result if it was made of just this, and nobody has written into it."""
        result = self.result
        return result if result is not None and marks == self.marks and result._version == self.version else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()


def _clear(kept: weakref.ref[Kept]) -> None:
    if (one := kept()) is not None:
        one.marks, one.result = (), None


def _mark(t: Tensor) -> tuple[Any, ...]:
    """Identify what a tensor holds: its memory (no other gets that address while it lives), its place, its writes."""
    place = (t.storage_offset(), t.shape, t.stride(), t.dtype)
    return weakref.ref(t.untyped_storage()), t._version, *place


class KeptProjection(Fusion):
    """A linear layer over image features, which are the same tensor at every decoding step."""

    op = "image_kv_cache"

    @staticmethod
    def forward(module: Any, original: Callable[..., Tensor], x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return original(module, x)
        sources = [t for t in (x, module.weight, module.bias) if t is not None]
        if not _steady(module, *sources):
            module.__dict__.pop(KEPT, None)
            return original(module, x)
        marks = tuple(map(_mark, sources))
        kept = module.__dict__.get(KEPT)
        result = None if kept is None else kept.get(marks)
        if result is None:
            result = original(module, x)
            module.__dict__[KEPT] = Kept(marks, x, result)
        return result


def _steady(module: Any, *sources: Tensor) -> bool:
    """Tell whether every write to the sources of a result would be seen, and the result carries no gradient."""
    if module.training or torch.is_grad_enabled() or torch.jit.is_tracing():
        return False
    x = sources[0]
    if torch.is_autocast_enabled(x.device.type) or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False  # a captured graph is replayed with other images at the same address
    return not any(type(t) not in (Tensor, nn.Parameter) or t.is_inference() for t in sources)


class ImageKeysOnce(Fusion):
    """A layer that cross-attends to images with `k_proj` and `v_proj`, which it would apply anew at every token."""

    op = "image_kv_cache"

    @staticmethod
    def refuses(module: Any) -> str | None:
        return plain(*_projections(module))

    @staticmethod
    def companions(module: Any) -> list[tuple[nn.Module, type[Fusion]]]:
        return [(part, KeptProjection) for part in _projections(module)]

    @staticmethod
    def forward(module: Any, original: Callable[..., Tensor], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # a new prompt, maybe behind writes through `.data`, which nothing counts
        if hidden_states.shape[1] > 1 and not torch.compiler.is_compiling():
            for part in (p for projection in _projections(module) for p in projection.modules()):
                part.__dict__.pop(KEPT, None)
        return original(module, hidden_states, *args, **kwargs)


def _projections(module: Any) -> tuple[nn.Module, nn.Module]:
    return module.cross_attn.k_proj, module.cross_attn.v_proj


class GatedLayer(Fusion):
    """Idefics' gated layer: x + tanh(alpha) * branch for both of its branches."""

    op = "gated_residual"

    @staticmethod
    def slower(module: Any, device: torch.device, dtype: torch.dtype) -> str | None:
        return _on_cpu(device)

    @staticmethod
    def refuses(module: Any) -> str | None:
        if type(module.act_cross_attn) is not nn.Tanh or type(module.act_dense) is not nn.Tanh:
            return f"its gates are {type(module.act_cross_attn).__name__}, not Tanh"
        return None

    @staticmethod
    def unsupported(
        module: Any, hidden_states: Tensor, attention_mask: Any = None, image_hidden_states: Tensor | None = None,
        image_attention_mask: Tensor | None = None, cross_attention_gate: Tensor | None = None,
        past_key_values: Any = None, **kwargs: Any,
    ) -> str | None:  # fmt: skip
        if image_hidden_states is None or cross_attention_gate is None or past_key_values is not None:
            return "transformers says what is wrong with its arguments"
        if module.training and module.config > 0:  # the name that Idefics gives to its dropout
            return "dropout in training"
        return _one_dtype(hidden_states, module.alpha_cross_attn)

    @staticmethod
    def forward(
        module: Any, original: Callable[..., Tensor], hidden_states: Tensor, attention_mask: Any = None,
        image_hidden_states: Tensor | None = None, image_attention_mask: Tensor | None = None,
        cross_attention_gate: Any = None, past_key_values: Any = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        branch, _ = module.cross_attn(
            hidden_states=module.input_layernorm(hidden_states), key_value_states=image_hidden_states,
            attention_mask=image_attention_mask, **kwargs,
        )  # fmt: skip
        branch = branch.masked_fill((cross_attention_gate == 0)[:, :, None], 0.0)  # rows that see no image
        hidden_states = gated_residual(hidden_states, branch, module.alpha_cross_attn.flatten())
        branch = module.mlp(module.post_attention_layernorm(hidden_states))
        return gated_residual(hidden_states, branch, module.alpha_dense.flatten())


class MllamaGatedLayer(Fusion):
    """Llama-3.2-Vision's cross-attention layer: the same with one number a gate, and rows without images masked."""

    op = "gated_residual"

    @staticmethod
    def slower(module: Any, device: torch.device, dtype: torch.dtype) -> str | None:
        return _on_cpu(device)

    @staticmethod
    def unsupported(module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> str | None:
        return "its arguments come by place" if args else _one_dtype(hidden_states, module.cross_attn_attn_gate)

    @staticmethod
    def forward(
        module: Any, original: Callable[..., Tensor], hidden_states: Tensor, *,
        cross_attention_states: Tensor | None, cross_attention_mask: Tensor | None,
        full_text_row_masked_out_mask: Any, past_key_values: Any = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        for name in ("attention_mask", "position_ids", "use_cache", "position_embeddings"):
            kwargs.pop(name, None)  # the layer takes them, its attention does not
        branch, _ = module.cross_attn(
            hidden_states=module.input_layernorm(hidden_states), attention_mask=cross_attention_mask,
            cross_attention_states=cross_attention_states, past_key_values=past_key_values, **kwargs,
        )  # fmt: skip
        hidden_states = gated_residual(hidden_states, branch, module.cross_attn_attn_gate)
        branch = module.mlp(module.post_attention_layernorm(hidden_states))
        if full_text_row_masked_out_mask is not None:
            branch = full_text_row_masked_out_mask[:, 0] * branch
        return gated_residual(hidden_states, branch, module.cross_attn_mlp_gate)


def _on_cpu(device: torch.device) -> str | None:
    # on a GPU two launches in place of six, and no gated branch is written and read again
    return "its gates are too little of a layer to gain on a CPU" if device.type == "cpu" else None


def _one_dtype(hidden_states: Tensor, gate: Tensor) -> str | None:
    if hidden_states.dtype != gate.dtype or torch.is_autocast_enabled(hidden_states.device.type):
        return f"branches may be of another dtype than {hidden_states.dtype}"
    return None
