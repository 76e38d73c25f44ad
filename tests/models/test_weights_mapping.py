"""Tables of names read both ways: nothing is lost, nothing unknown is swallowed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmllm.models.weights.mapping import Conv, Join, Positions, Rule, View, fill, prefixed, to_ours, to_theirs

TABLE = [
    Rule("blocks.{i}.qkv.{p}", tuple(f"layers.{{i}}.{n}_proj.{{p}}" for n in "qkv"), Join(parts=3)),
    Rule("blocks.{i}.{norm}.weight", "layers.{i}.{norm}.weight"),
    Rule("patch.weight", "conv.weight", Conv(patch_size=2)),
    Rule(("cls_position", "position"), "positions.weight", Positions()),
    Rule("cls", "class_token", View(ours=(-1,), theirs=(1, 1, -1))),
]


def _theirs():
    state = {
        "conv.weight": torch.randn(4, 3, 2, 2),
        "positions.weight": torch.randn(5, 4),
        "class_token": torch.randn(1, 1, 4),
    }
    for i in range(12):
        state |= {f"layers.{i}.{n}_proj.{p}": torch.randn(*((4, 4) if p == "weight" else (4,)))
                  for n in "qkv" for p in ("weight", "bias")}  # fmt: skip
        state[f"layers.{i}.norm1.weight"] = torch.randn(4)
    return state


def test_there_and_back_is_the_same_bit_for_bit():
    theirs = {"tower." + k: v for k, v in _theirs().items()} | {"head.weight": torch.randn(2, 2)}
    rules = prefixed(TABLE, ours="vision.", theirs="tower.")
    ours, rest = to_ours(theirs, rules, "a checkpoint", unused=["head.{p}"])
    assert list(rest) == ["head.weight"]
    assert ours["vision.blocks.11.qkv.weight"].shape == (12, 4)
    assert torch.equal(ours["vision.blocks.3.qkv.bias"][4:8], theirs["tower.layers.3.k_proj.bias"])
    assert ours["vision.patch.weight"].shape == (12, 4)
    assert ours["vision.cls_position"].shape == (4,)
    back = to_theirs(ours, rules, rest)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[k], theirs[k]) for k in theirs)


def test_a_three_dimensional_patch_goes_there_and_back():
    weight = torch.randn(5, 3, 2, 4, 4)
    form = Conv(patch_size=4, frames=2)
    assert torch.equal(form.unpack(form.pack([weight]))[0], weight)


def test_an_unknown_name_and_a_missing_part_are_named():
    state = _theirs()
    with pytest.raises(ValueError, match=r"a checkpoint has tensors .*: extra\.thing"):
        to_ours(state | {"extra.thing": torch.ones(1)}, TABLE, "a checkpoint")
    del state["layers.7.k_proj.bias"]
    with pytest.raises(ValueError, match=r"a checkpoint lacks layers\.7\.k_proj\.bias"):
        to_ours(state, TABLE, "a checkpoint")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("bias"), "lacks: bias"),
        (lambda s: s.update(more=torch.ones(1)), "does not: more"),
        (lambda s: s.update(bias=torch.ones(3)), r"other shapes .*bias is \(3,\), not \(2,\)"),
    ],
)
def test_a_model_is_filled_completely_or_not_at_all(change, message):
    with torch.device("meta"):
        model = nn.Linear(4, 2)
    state = {"weight": torch.randn(2, 4), "bias": torch.randn(2)}
    fill(model, state, "a checkpoint")
    assert torch.equal(model.weight, state["weight"])
    change(state)
    with pytest.raises(ValueError, match=message):
        fill(model, state, "a checkpoint")
