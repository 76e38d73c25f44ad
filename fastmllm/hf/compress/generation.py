"""`generate` on a shortened prompt, whose answer comes back behind the prompt as it was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmllm.hf.compress.features import refuse_other_inputs
from fastmllm.hf.compress.media import IMAGE
from fastmllm.hf.compress.rows import Rows
from fastmllm.hf.compress.seams import KEY
from fastmllm.hf.compress.state import Compression
from fastmllm.hf.compress.text import remember, shorten_text


@torch.no_grad()
def generate(module: Any, original: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Shorten the prompt by what the connector takes, generate, and put the prompt's own ids back in front.

    Streamers, stopping criteria and processors of logits see the shortened prompt. Layers that drop tokens remember
    where the question ends: without a cache each of its tokens is judged anew.
    """
    state: Compression = module.model.__dict__[KEY]
    call = {name: value for name, value in given.items() if name != "inputs"}
    ids: Any = call.get("input_ids") if given.get("inputs") is None else given["inputs"]
    call["input_ids"] = ids
    rows = None
    with state.call(shortened=state.compressor is not None):
        if state.compressor is not None:
            rows = _shortened(state, module, call)
        if rows is None:
            state.now.held.clear()  # whoever repeats rows for beams repeats the images, too
        else:
            _limit(module, call, ids.shape[1] - call["input_ids"].shape[1])
        columns = 0 if ids is None else call["input_ids"].shape[1]
        if state.stages:
            _refuse_chunks(module, call, columns)
        with state.call(prompt=columns, grids=call.get(IMAGE.grids)):
            out = original(module, **(given if rows is None else call))
    if rows is None:
        return out
    sequences = out if isinstance(out, Tensor) else out.sequences
    times = len(sequences) // len(ids)
    answer = sequences[:, call["input_ids"].shape[1] :]
    sequences = torch.cat([ids.repeat_interleave(times, 0).to(answer.device), answer], 1)
    remember((call if isinstance(out, Tensor) else out).get("past_key_values"), state.owner, rows, None, times)
    if isinstance(out, Tensor):
        return sequences
    out.sequences = sequences
    return out


def _shortened(state: Compression, module: Any, call: dict[str, Any]) -> Rows | None:
    """Rewrite a call in place; return what is left of its prompt, None where nothing is to be rewritten.

    Raises:
        ValueError: image features or a model come along that were compressed already.
    """
    refuse_other_inputs(state, call, True)
    assistant = call.get("assistant_model")
    if assistant is not None and any(KEY in part.__dict__ for part in assistant.modules()):
        raise ValueError("compress: the assistant_model is compressed too, and would shorten a short text: unpatch it")
    if call["input_ids"] is None:
        return None
    if call.get("attention_mask") is None:
        call["attention_mask"] = _mask(module, call["input_ids"], call)
    return shorten_text(state, call, left=True, whole=True)


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
