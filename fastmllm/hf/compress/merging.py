"""Token Merging (Bolya et al., arXiv 2210.09461) inside of the towers of transformers, between attention and MLP."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from fastmllm.compression import Probe
from fastmllm.compression.budget import tokens_to_keep
from fastmllm.compression.merge_schedule import merge_schedule
from fastmllm.compression.tokens import cumulative
from fastmllm.hf.compress.fitting import has_class_token
from fastmllm.hf.compress.rows import Images
from fastmllm.hf.compress.seams import KEY
from fastmllm.hf.compress.state import Compression
from fastmllm.hf.fusion import ORIGINAL, Fusion
from fastmllm.kernels.attention import attention
from fastmllm.kernels.token_merge import token_merge

ENCODERS = {"CLIPEncoder": "CLIPEncoderLayer", "SiglipEncoder": "SiglipEncoderLayer"}


class MergingLayer(Fusion):
    """A pre-norm layer that merges tokens where its encoder asks for it; other calls run transformers' own."""

    op = "compress"

    @staticmethod
    def forward(
        module: Any, original: Callable[..., Any], hidden_states: Tensor, attention_mask: Tensor | None = None,
        *args: Any, merges: int | None = None, size: Tensor | None = None, protected: int = 0, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Return what `original` does, or with `merges` the tokens (I, S - merges, C) and their sizes (I, S - merges).

        Sizes come and go as arguments: a layer whose forward gradient checkpointing repeats finds them again.
        """
        if merges is None:
            return original(module, hidden_states, attention_mask, *args, **kwargs)
        # reentrant checkpointing asks for the gradient of all it returns
        size = None if size is None else size.detach()
        branch, keys = _attend(module.self_attn, module.layer_norm1(hidden_states), size)
        x = hidden_states + branch
        if merges:
            merged = token_merge(x, keys, size, merges, protected=protected)
            x, size = merged.tokens, merged.size
        return x + module.mlp(module.layer_norm2(x)), size


def _attend(module: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return attention (I, S, C) to which a token counts as what it stands for, and its keys (I, S, D)."""
    if module.training and module.dropout:
        raise ValueError("compress: tokens merge in a tower without attention dropout: set its dropout to 0")
    images, rows = x.shape[:2]
    q, k, v = (getattr(module, n)(x).view(images * rows, -1, module.head_dim) for n in ("q_proj", "k_proj", "v_proj"))
    starts = cumulative((rows,) * images, x.device)
    bias = None if size is None else size.flatten().log()
    out, lse = attention(
        q, k, v, starts, max_seqlen_q=rows, softmax_scale=module.scale, key_bias=bias, return_lse=True
    )  # fmt: skip
    probe = Probe(q=q.detach(), k=k.detach(), lse=lse, cu_seqlens=starts, max_seqlen=rows, key_bias=bias)
    return module.out_proj(out.view(images, rows, -1)), probe.keys().view(images, rows, -1)


class MergingEncoder(Fusion):
    """The stack of layers, of which those in front of the features that the model reads merge."""

    op = "compress"

    @staticmethod
    def forward(
        module: Any, original: Callable[..., Any], inputs_embeds: Tensor, attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        state: Compression = module.__dict__[KEY]
        if state.now.medium is None or state.compressor is None:  # somebody asks for the tower alone
            return original(module, inputs_embeds, attention_mask, **kwargs)
        images, rows = inputs_embeds.shape[:2]
        lead = int(state.cls_token)
        before = (rows - lead,) * images
        after = tokens_to_keep(state.compressor.name, state.compressor.keep, before)
        state.now.images = Images(before, after)
        if before == after:
            return original(module, inputs_embeds, attention_mask, **kwargs)
        if attention_mask is not None:
            raise ValueError("compress: tokens merge in a tower that sees all of its images: its attention is masked")
        count = len(module.layers)
        used = layers_read(state.owner.config, count)
        schedule = [r[0] for r in merge_schedule([rows], [after[0] + lead], used, lead)] + [0] * (count - used)
        x: Tensor = inputs_embeds
        size = None
        for layer, merges in zip(module.layers, schedule, strict=True):
            x, size = layer(x, None, merges=merges, size=size, protected=lead, **kwargs)
        made = sys.modules["transformers.modeling_outputs"].BaseModelOutput  # loaded with every tower
        return made(last_hidden_state=x)


def layers_read(config: Any, count: int) -> int:
    """Return how many of a tower's layers the features that a model reads have passed."""
    layer = getattr(config, "vision_feature_layer", None)
    return count if layer is None else int(layer) % (count + 1)


def merging(at: str, state: Compression) -> Iterator[tuple[str, nn.Module, type[Fusion], dict[str, Any], None]]:
    """Yield the parts of a tower inside of which tokens merge, as `compress_fusions` does.

    Args:
        at: the name of the tower.
        state: of the model.

    Raises:
        ValueError: its layers are others than we know, or the model reads more of it than one layer's patches.
    """
    tower = getattr(state.owner, str(state.seam.tower))

    def refuse(why: str) -> None:
        raise ValueError(f"patch: cannot merge tokens inside of {type(tower).__name__}: {why}")

    found = [(n, m) for n, m in tower.named_modules() if getattr(type(m), ORIGINAL, type(m)).__name__ in ENCODERS]
    if len(found) != 1:
        refuse(f"its layers are none that we know: {', '.join(ENCODERS)}")
    name, encoder = found[0]
    config = state.owner.config
    layer = getattr(config, "vision_feature_layer", None)
    if isinstance(layer, list | tuple):
        refuse(f"the model reads layers {layer}, of which each would have other tokens")
    if layers_read(config, len(encoder.layers)) < 1:
        refuse("the model reads what goes into its first layer")
    state.cls_token = has_class_token(tower)
    if state.cls_token != (getattr(config, "vision_feature_select_strategy", "full") == "default"):
        said = "stands among the tokens of the image" if state.cls_token else "is taken off, and there is none"
        refuse(f"its class token {said} (vision_feature_select_strategy)")
    kept = {KEY: state}
    yield f"{at}.{name}", encoder, MergingEncoder, kept, None
    for number, part in enumerate(encoder.layers):
        yield f"{at}.{name}.layers.{number}", part, MergingLayer, {}, None


def same_layer(state: Compression, call: dict[str, Any]) -> None:
    """Refuse a call that reads another layer of the tower than the one that tokens are merged for.

    Raises:
        ValueError: says which.
    """
    for name in ("vision_feature_layer", "vision_feature_select_strategy"):
        said = getattr(state.owner.config, name, None)
        if call.get(name) not in (None, said):
            raise ValueError(f"compress: {name}={call[name]!r}: tokens merge for {said!r}, the model's own")
