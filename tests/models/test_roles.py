"""Every parameter of every composition has one role, and what recomputes changes no bit."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from tiny_compositions import allowed, labels, redrawn, samples, tiny
from tiny_vlm import tiny_vlm
from torch import nn

from fastmllm.models.mllm import MLLM
from fastmllm.models.recompute import is_recomputed, layers_of, recompute, recomputing
from fastmllm.models.roles import named_roles


def test_each_parameter_has_one_role() -> None:
    for parts in allowed():
        model = MLLM.from_config(tiny(*parts))
        roles, names = model.roles(), [name for name, _ in model.named_parameters(remove_duplicate=False)]
        assert sorted(name for group in roles.values() for name in group) == sorted(names)
        assert ("cross_attention" in roles) == (parts[3] not in ("tokens", "deepstack"))
        assert ("connector" in roles) == (parts[2] != "none" or parts[0] == "mllama"), parts
        assert all(name.startswith(("images.vision.", "images.high.")) for name in roles["vision"])
        assert not any("merger" in name or "deepstack" in name for name in roles["vision"])
        assert {name.split(".")[-2] for name in roles["embeddings"]} == {"embed_tokens", "lm_head"}
    roles = tiny_vlm().roles()
    assert list(roles) == ["vision", "connector", "llm", "embeddings"]
    with pytest.raises(AssertionError, match=r"connector\.norm.weight has no role"):
        named_roles(tiny_vlm(), {"vision.": "vision"})


CASES = [
    ("vit", "anyres", "mlp", "tokens"), ("qwen", "native", "merger", "deepstack"),
    ("mllama", "mllama", "none", "mllama"), ("vit", "dual", "qformer", "cogagent"),
    ("vit", "fixed", "resampler", "flamingo"),
]  # fmt: skip


def note(calls: list[str], module: nn.Module, *_: object) -> None:
    calls.append(type(module).__name__)


@pytest.mark.parametrize("parts", CASES)
def test_a_role_that_recomputes_runs_twice_and_changes_no_bit(parts: tuple[str, str, str, str]) -> None:
    model = copy.deepcopy(redrawn(tiny(*parts))).train()
    batch = samples()
    inputs = model.pack(batch, labels(batch))
    model(inputs).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for role, names in model.roles().items():
        if role == "embeddings":
            continue
        units = layers_of(model, names, whole=role == "connector")
        calls: list[str] = []
        hooks = [m.register_forward_pre_hook(partial(note, calls)) for m in units]
        model.zero_grad()
        with recomputing(units):
            model(inputs).backward()
        for hook in hooks:
            hook.remove()
        assert units, role
        assert len(calls) == 2 * len(units), (role, len(calls), len(units))
        assert not any(map(is_recomputed, units))
        for name, p in model.named_parameters():
            if p.grad is not None:
                assert torch.equal(p.grad, plain[name]), (role, name)


def test_what_was_recomputed_before_stays_so() -> None:
    model = tiny_vlm()
    first, second = model.language.model.layers
    kind = type(first)
    recompute([first])
    recompute([first])
    with recomputing([first, second]):
        assert is_recomputed(second)
        assert isinstance(second, kind)
    assert is_recomputed(first)
    assert not is_recomputed(second)
    assert not model.language.gradient_checkpointing
    recompute([first], on=False)
    assert type(first) is kind
    assert copy.deepcopy(model).roles() == model.roles()
