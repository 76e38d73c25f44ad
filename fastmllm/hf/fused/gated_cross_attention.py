"""Gated cross-attention layers without a cache: an image's keys and values are made once for all words."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fastmllm.hf.fusion import STATE, Fusion, hooked, plain

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
        return _once(module, KEPT, sources, lambda: original(module, x))


def _once(module: Any, name: str, sources: list[Tensor], make: Callable[[], Tensor]) -> Tensor:
    """Return what `make` made of just these sources, as long as the memory of the first of them lives."""
    marks = tuple(map(_mark, sources))
    kept = module.__dict__.get(name)
    result = None if kept is None else kept.get(marks)
    if result is None:
        result = make()
        module.__dict__[name] = Kept(marks, sources[0], result)
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
        return [(module.cross_attn, KeptHeads), *((part, KeptProjection) for part in _projections(module))]

    @staticmethod
    def forward(module: Any, original: Callable[..., Tensor], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # a new prompt, maybe behind writes through `.data`, which nothing counts
        if hidden_states.shape[1] > 1 and not torch.compiler.is_compiling():
            for part in (p for projection in _projections(module) for p in projection.modules()):
                part.__dict__.pop(KEPT, None)
        return original(module, hidden_states, *args, **kwargs)


def _projections(module: Any) -> tuple[nn.Module, nn.Module]:
    return module.cross_attn.k_proj, module.cross_attn.v_proj


class KeptHeads(Fusion):
    """The attention of one word: keys normalised once, and each head's keys and values next to each other.

    That is how a CPU's SDPA reads them 2 to 3 times as fast as it reads a projection's rows, and twice as fast again
    in fp32 as in bf16.
    """

    op = "image_kv_cache"

    @staticmethod
    def forward(
        module: Any, original: Callable[..., Any], hidden_states: Tensor, key_value_states: Tensor | None = None,
        attention_mask: Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        image, norm = key_value_states, module.k_layer_norm if module.qk_layer_norms else None
        if (
            hidden_states.shape[1] != 1 or image is None or attention_mask is None or torch.compiler.is_compiling()
            or any(value is not None for value in kwargs.values()) or module.config._attn_implementation != "sdpa"
            or not _steady(module, image) or (norm is not None and hooked(norm))
        ):  # fmt: skip
            return original(module, hidden_states, image, attention_mask, **kwargs)
        q, k, v = module.q_proj(hidden_states), module.k_proj(image), module.v_proj(image)
        sources = [k] if norm is None else [k, norm.weight]
        if not _steady(module, *sources, v):
            return original(module, hidden_states, image, attention_mask, **kwargs)
        split = (module.num_heads, module.head_dim)
        q = q.unflatten(-1, split).transpose(1, 2)
        q = q if norm is None else module.q_layer_norm(q)

        def heads(t: Tensor, norm: Any = None) -> Tensor:
            t = t.unflatten(-1, split)
            t = (t if norm is None else norm(t)).transpose(1, 2)
            wide = torch.promote_types(t.dtype, torch.float32) if t.is_cpu else t.dtype
            # a copy in any case: a view of the projection would keep alive what it is kept for
            return t.to(wide, copy=True, memory_format=torch.contiguous_format)

        k = _once(module, KEPT + "_keys", sources, lambda: heads(k, norm))
        v = _once(module, KEPT + "_values", [v], lambda: heads(v))
        out = scaled_dot_product_attention(q.to(k.dtype), k, v, attention_mask.to(k.dtype), scale=module.scaling)
        return module.o_proj(out.to(q.dtype).flatten(1).unsqueeze(1)), None
