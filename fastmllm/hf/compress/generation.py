"""`generate` on a shortened prompt, whose answer comes back behind the prompt as it was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmllm.hf.compress.state import KEY, Compression
from fastmllm.hf.compress.text import encode, refuse_other_inputs, remember, shorten_text


@torch.no_grad()
def generate(module: Any, original: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Encode and compress the images, shorten the prompt, generate, and put the prompt's own ids back in front.

    Streamers, stopping criteria and processors of logits see the shortened prompt.
    """
    owner = module.model
    state: Compression = owner.__dict__[KEY]
    call = {name: value for name, value in given.items() if name != "inputs"}
    ids = call["input_ids"] = call.get("input_ids") if given.get("inputs") is None else given["inputs"]
    refuse_other_inputs(call, videos=state.seam.videos)
    assistant = call.get("assistant_model")
    if assistant is not None and any(KEY in part.__dict__ for part in assistant.modules()):
        raise ValueError("compress: the assistant_model is compressed too, and would shorten a short text: unpatch it")
    with state.call():
        if ids is None:
            return original(module, **given)
        if call.get("attention_mask") is None:
            call["attention_mask"] = _mask(module, ids, call)
        images = encode(state, owner, call)
        rows = shorten_text(state, owner, call, images, left=True, whole=True)
        if rows is None:
            state.now.held.clear()  # whoever repeats rows for beams repeats the images, too
            return original(module, **given)
        _limit(module, call, ids.shape[1] - call["input_ids"].shape[1])
        out = original(module, **call)
    sequences = out if isinstance(out, Tensor) else out.sequences
    times = len(sequences) // len(ids)
    answer = sequences[:, call["input_ids"].shape[1] :]
    sequences = torch.cat([ids.repeat_interleave(times, 0).to(answer.device), answer], 1)
    if isinstance(out, Tensor):
        remember(call.get("past_key_values"), owner, rows, times)
        return sequences
    out.sequences = sequences
    remember(out.get("past_key_values"), owner, rows, times)
    return out


def _mask(module: Any, ids: Tensor, call: dict[str, Any]) -> Tensor | None:
    """Return the mask that `generate` itself would make of padding that it recognises."""
    config = call.get("generation_config") or module.generation_config
    padding, end = (call.get(f"{n}_token_id", getattr(config, f"{n}_token_id", None)) for n in ("pad", "eos"))
    ends = end if isinstance(end, list | tuple) else [end]
    if padding is None or padding in ends or not bool((ids == padding).any()):
        return None
    return (ids != padding).long()


def _limit(module: Any, call: dict[str, Any], fewer: int) -> None:
    """Lower limits that count the prompt by the tokens that it has lost."""
    config = call.get("generation_config") or module.generation_config
    for name, other in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        limit = call.get(name, getattr(config, name, None))
        if limit and call.get(other, getattr(config, other, None)) is None:
            call[name] = limit - fewer
