"""What the parts of a model do while visual tokens are dropped between the layers of its language model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmllm.hf.compress.parts import whole
from fastmllm.hf.compress.rows import PAD
from fastmllm.hf.compress.stages import NUMBER, STAGES, Stages
from fastmllm.hf.compress.text import refuse_other_inputs
from fastmllm.hf.fusion import Fusion, arguments, bound_forward


class StagedLayer(Fusion):
    """A decoder layer from the first stage on, or the one in front of it.

    Its call is replaced, not its forward: gradient checkpointing computes a forward anew, in another order.
    """

    op = "compress"
    overrides = ("__call__",)

    @staticmethod
    @torch.compiler.disable(recursive=False)
    def __call__(module: Any, original: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        state: Stages = module.__dict__[STAGES]
        way, layer = state.now.way, module.__dict__[NUMBER]
        if way is None:
            return original(module, hidden_states, *args, **kwargs)
        if args:
            kwargs = arguments(type(module).forward, (hidden_states, *args), kwargs)
            del kwargs["hidden_states"]
        x = way.enter(layer, hidden_states, state.listeners.get(layer - 1), kwargs.get("past_key_values"))
        kwargs = way.arranged(layer, kwargs, x.dtype)
        listener = state.listeners.get(layer)
        listening = listener is not None and way.reduction is not None
        with listener.listen(kwargs["position_embeddings"]) if listener and listening else nullcontext():
            return original(module, x, **kwargs)


class StagedText(Fusion):
    """A language model with DeepStack: features of an image are added to the tokens that are left of it."""

    op = "compress"
    overrides = ("_deepstack_process",)

    @staticmethod
    def _deepstack_process(
        module: Any, original: Callable[..., Tensor], hidden_states: Tensor, visual_pos_masks: Tensor,
        visual_embeds: Tensor,
    ) -> Tensor:  # fmt: skip
        way = module.__dict__[STAGES].now.way
        number = 0 if way is None else way.group(way.layer)
        if not number or way.reduction is None or not way.lost(number):
            return original(module, hidden_states, visual_pos_masks, visual_embeds)
        index = way.new[number].index.to(visual_pos_masks.device)
        at = torch.where(index == PAD, 0, index - way.held.columns)
        mask = visual_pos_masks.gather(1, at) & (index != PAD)
        ordinal = (visual_pos_masks.flatten().cumsum(0) - 1).view_as(visual_pos_masks).gather(1, at)
        places = torch.nonzero_static(mask.flatten(), size=sum(way.reduction.visual.seqlens))[:, 0]
        chosen = ordinal.flatten().index_select(0, places).to(visual_embeds.device)
        return original(module, hidden_states, mask, visual_embeds.index_select(0, chosen))


class StagedOwner(Fusion):
    """The model without head."""

    op = "compress"
    overrides: ClassVar[tuple[str, ...]] = ("forward", "get_image_features")

    @staticmethod
    def get_image_features(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        features = module.__dict__[STAGES].now.held
        return original(module, *args, **kwargs) if features is None else features

    @staticmethod
    def forward(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return staged(module, module, original, args, kwargs)


class StagedHead(Fusion):
    """The model with a head: labels lose the tokens before anything reads them."""

    op = "compress"
    overrides = ("forward", "generate")

    @staticmethod
    def forward(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return staged(module, module.model, original, args, kwargs)

    @staticmethod
    def generate(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Remember where the question ends: without a cache each of its tokens is judged anew."""
        now, call = module.model.__dict__[STAGES].now, arguments(original, args, kwargs)
        ids = call.get("inputs") if call.get("input_ids") is None else call["input_ids"]
        _refuse_chunks(module, call, 0 if ids is None else ids.shape[1])
        now.prompt, now.grids = 0 if ids is None else ids.shape[1], call.get("image_grid_thw")
        try:
            return original(module, *args, **kwargs)
        finally:
            now.prompt, now.grids = 0, None


def _refuse_chunks(module: Any, call: dict[str, Any], columns: int) -> None:
    """Refuse a prompt in chunks: a stage would take a part of an image for all of it.

    Raises:
        ValueError: says so.
    """
    config = call.get("generation_config") or module.generation_config
    chunk = call.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
    if chunk and chunk < columns:
        raise ValueError(
            f"compress: prefill_chunk_size={chunk} cuts the prompt of {columns} tokens, and a stage chooses among all "
            "tokens of an image: leave it out"
        )


@torch.compiler.disable(recursive=False)  # the text is read on the host; what is called from here is compiled
def staged(module: Any, owner: Any, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Run a model's forward, whose layers drop tokens on the way."""
    state: Stages = owner.__dict__[STAGES]
    if state.now.busy:
        return original(module, *args, **kwargs)
    call = arguments(original, args, kwargs)
    refuse_other_inputs(call, ("image_hidden_states",))
    replaced = module is not state.head and state.head is not None and bound_forward(state.head)
    if replaced and module.training and state.judged:
        raise ValueError(
            "compress: where an answer begins decides what is left, and the forward that somebody has put in place of "
            f"the model's keeps its labels back ({replaced}): a method that does not judge by attention"
        )
    with state.call():
        rows = state.begin(call)
        way = state.now.way
        out = original(module, **call)
    if rows is not None and replaced:
        out = whole(rows, out)
    state.hold(out.get("past_key_values") if isinstance(out, dict) else call.get("past_key_values"), way)
    return out
