"""Speed up a Hugging Face vision-language model in one line, and take it back in one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastmllm.compression import Compressor, Placement
from fastmllm.hf.compress import compress_fusions
from fastmllm.hf.fusion import STATE, TOGETHER, Fusion, Together, bound_forward, fuse, is_fused, restore
from fastmllm.hf.report import Report, Row
from fastmllm.hf.rules import OPS, fusions_of, known_class, unknown_families
from fastmllm.hf.rules.dense import WHY, dense_attention

Plan = dict[nn.Module, list[type[Fusion]]]
Kept = list[tuple[nn.Module, dict[str, Any]]]  # what is to lie on modules beside their parameters


class PatchError(ValueError):
    """Something that was asked for does not apply; the model is as it was."""


def patch(
    model: nn.Module, compress: Placement | Compressor | str | None = None, *, ops: Iterable[str] | None = None,
    strict: bool = False,
) -> Report:  # fmt: skip
    """Let the modules of a model compute with fastmllm's operators, in place and until `unpatch`.

    Weights, their names, hooks and every class's name stay; other models and torch itself are not touched. A call that
    a fused module cannot compute (`output_attentions`, an unknown mask …) runs transformers' own code, and is counted
    in `report.fallbacks()`. In training, a patched model that is given `labels` returns the loss without `logits`
    (None), as Liger does; in `eval()` mode it returns both. What is worth replacing depends on the device and dtype
    that the model has now: patch again after moving it. A batch without a scored label has loss 0, where transformers
    has NaN. Operators have first derivatives; what runs under `torch.func` or in forward mode is transformers' code.

    Args:
        model: of transformers, or one that contains such (PEFT, DDP, …).
        compress: compress visual tokens at the connector, inside of the tower (`Placement(merge=…)`), in front of
            cross-attention or of layers of the language model (`Placement(stages=…)`), in training, inference and
            `generate`: a published method's name, with its own budget or another ("VisionZip", "visionzip:64",
            "divprune:0.25", "sparsevlm:300/200/110"), a
            `fastmllm.compression.Placement`, or a compressor. One with weights learns as the caller trains it: it is
            moved to the model's device and dtype, and stays outside of its state_dict. The text is shortened with its
            images: logits of `forward` are (rows, tokens that are left in the longest row, vocabulary), so predictions
            that a Trainer hands to `compute_metrics` are shorter than its `label_ids`, which are the batch's own;
            `generate` returns the prompt as it was given. Where somebody else's forward has replaced the model's (TRL),
            hidden states get the text's own columns again, 0 where tokens are gone.
            In front of a layer the text is read as it was given, and is as short behind the last stage.
        ops: operators to use wherever a module's structure allows, even where they are slower; None uses all of them,
            but only where they are at least as fast: by measurement on a CPU, on CUDA by launches and bytes as yet.
        strict: raise if a module that one of `ops` is for cannot have it, if none is there, or, without `ops`, if
            nothing at all can be replaced.

    Returns:
        What was replaced, and what was left for which reason; print it.

    Raises:
        PatchError: with `strict`, lists what did not apply.
        TypeError: what was given is no model, or `ops` is one name.
        ValueError: an unknown operator or method, or compression that this model cannot have.

    Patching a patched model is patching it anew; where that raises, it stays patched as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: takes a model, an instance of torch.nn.Module, not {model!r}")
    if isinstance(ops, str):
        raise TypeError(f"patch: ops={ops!r}: give a list of names, [{ops!r}]")
    asked = None if ops is None else frozenset(ops)
    if asked is not None and (unknown := asked - set(OPS)):
        raise ValueError(f"patch: ops {sorted(unknown)} are none of {sorted(OPS)}")
    with _put_back_on_error(model):
        unpatch(model)
        plan, rows, kept = _plan(model, compress, asked, strict)
    for module, fusions in plan.items():
        fuse(module, tuple(dict.fromkeys(fusions)))
    for module, state in kept:
        module.__dict__.update(state)
    return Report(model, rows)


@contextmanager
def _put_back_on_error(model: nn.Module) -> Iterator[None]:
    """Patch a model again, as it was patched, if what is done with it raises."""
    before = [
        (module, type(module)._fastmllm_fusions, {n: x for n, x in module.__dict__.items() if n.startswith(STATE)})  # type: ignore[attr-defined]
        for module in model.modules() if is_fused(module)
    ]  # fmt: skip
    shared = [state[TOGETHER] for *_, state in before if TOGETHER in state]
    whole = [together.whole for together in shared]
    try:
        yield
    except BaseException:
        for together, was in zip(shared, whole, strict=True):
            together.whole = was
        for module, fusions, state in before:
            if not is_fused(module):
                fuse(module, fusions)
                module.__dict__.update(state)
        raise


def _plan(
    model: nn.Module, compress: Placement | Compressor | str | None, asked: frozenset[str] | None, strict: bool
) -> tuple[Plan, list[Row], Kept]:
    """Say what an unpatched model's modules are to compute with, and what the report says of it."""
    plan: Plan = {}
    rows: list[Row] = []
    names = {module: name for name, module in model.named_modules()}
    for module, fusion in list(_candidates(model)):
        if asked is not None and fusion.op not in asked:
            continue
        device, dtype = _place(module)
        absent = fusion.absent(device)
        refused = bound_forward(module) or absent or _refused(module, fusion, device)
        slower = None if refused or asked is not None else fusion.slower(module, device, dtype)
        done = not (refused or slower)
        rows.append(
            Row(
                module=names[module], kind=type(module).__name__, op=fusion.op,
                refused=refused is not None and (refused != absent or asked is not None),
                backend=fusion.backend(device) if done else None, reason=refused or slower or "",
            )
        )  # fmt: skip
        if done:
            plan.setdefault(module, []).append(fusion)
            for part, beside in fusion.companions(module):
                plan.setdefault(part, []).append(beside)
    for name, module, family in unknown_families(model):
        why = f"no rules for {family}: of its modules norms and patch convolutions alone are looked at"
        rows.append(Row(module=name, kind=type(module).__name__, op="–", backend=None, reason=why))
    for name, module in dense_attention(model) if asked is None else ():
        rows.append(Row(module=name, kind=type(module).__name__, op="–", backend=None, reason=WHY))
    kept: Kept = []
    together = Together()
    for name, module, fusion, state, said in compress_fusions(model, compress):
        if said is not None:
            rows.append(Row(module=name, kind=type(module).__name__, op="compress", backend=said))
        plan.setdefault(module, []).append(fusion)  # the outermost: what others read is short already
        kept.append((module, {**state, TOGETHER: together}))
    failed = [row for row in rows if row.refused] if asked is not None else []
    missing = sorted((asked or frozenset()) - {row.op for row in rows})
    if asked is None and not any(row.backend for row in rows):
        missing = ["anything"]
    if strict and (failed or missing):
        lines = [f"  {row.module or '(model)'} ({row.kind}), {row.op}: {row.reason}" for row in failed]
        lines += [f"  {op}: no module of this model computes it" for op in missing]
        raise PatchError("patch: asked for, but does not apply; the model is unchanged:\n" + "\n".join(lines))
    return plan, rows, kept


def unpatch(model: nn.Module) -> nn.Module:
    """Give every module of a model its own class back; the model computes bit for bit what it did before.

    A part of a patched model may be given: what is around it stays patched, but compresses no more if that part did.

    Returns:
        The model.

    Raises:
        PatchError: another library derived a class of its own from a fused one (FSDP2): take that off first.
    """
    for name, module in model.named_modules():
        if is_fused(module):
            restore(module)
        elif any(getattr(base, "_fastmllm_fusions", None) for base in type(module).__mro__):
            raise PatchError(f"unpatch: {name} is now a {type(module)}, made of a patched module: unwrap it first")
    return model


def _refused(module: nn.Module, fusion: type[Fusion], device: torch.device) -> str | None:
    if device.type == "meta":
        return "its weights are on the meta device: load them first"
    if (known := known_class(module)) is not type(module):
        return f"{type(module).__name__} is derived from {known.__name__} and may compute otherwise"
    try:
        return fusion.refuses(module)
    except Exception as error:  # weights that are no plain tensors: FSDP2's, quantised ones
        return f"it cannot be looked into ({type(error).__name__}: {str(error)[:80]})"


def _candidates(model: nn.Module) -> Iterator[tuple[nn.Module, type[Fusion]]]:
    for module in model.modules():
        for fusion in fusions_of(module):
            yield module, fusion


def _place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype of a module's weights."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.get_default_dtype()
