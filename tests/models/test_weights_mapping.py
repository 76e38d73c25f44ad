"""Tables of names read both ways: nothing is lost, nothing unknown is swallowed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmllm.models.weights.connectors import Cut
from fastmllm.models.weights.mapping import Conv, Join, Positions, Rule, View, fill, prefixed, to_ours, to_theirs
from fastmllm.models.weights.tower_layouts import QueryApart, Transposed

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
    ours, rest = to_ours(theirs, rules, "a checkpoint", unused={"head.{p}": None})
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
    ("name", "shape", "message"),
    [
        ("layers.7.k_proj.weight", (6, 4), r"layers\.7\.k_proj\.weight is \(6, 4\), not \(4, 4\)"),  # 4 + 6 + 2 rows
        ("layers.7.v_proj.bias", (4, 1), r"layers\.7\.v_proj\.bias is \(4, 1\), not \(4\)"),
        ("layers.7.q_proj.bias", (), r"layers\.7\.q_proj\.bias is \(\), not \(any\)"),
        ("conv.weight", (4, 3, 4, 1), r"conv\.weight is \(4, 3, 4, 1\), not \(any, 3, 2, 2\)"),
        ("conv.weight", (4, 12), r"conv\.weight is \(4, 12\), not \(any, 3, 2, 2\)"),
        ("positions.weight", (20,), r"positions\.weight is \(20,\), not \(any, any\)"),
        ("class_token", (2, 2), r"class_token is \(2, 2\), not \(1, 1, any\)"),
        ("extra.weight", (2, 4), r"extra\.weight is \(2, 4\), not \(3, 4\)"),
        ("fused.bias", (), r"fused\.bias is \(\), not \(any\)"),
        ("in_proj", (13, 4), r"in_proj is \(13, 4\), not \(12, 4\)"),
        ("turned", (4,), r"turned is \(4,\), not \(any, any\)"),
    ],
)
def test_a_tensor_of_another_shape_is_named_before_it_is_joined_or_cut(name, shape, message):
    table = [
        *TABLE,
        Rule("table.weight", ("base.weight", "extra.weight"), Join(sizes=(5, 3))),
        Rule(("q.bias", "k.bias", "v.bias"), "fused.bias", Cut()),
        Rule(("query", "rest"), "in_proj", QueryApart(4)),
        Rule("ours", "turned", Transposed()),
    ]
    state = _theirs() | {"base.weight": torch.randn(5, 4), "extra.weight": torch.randn(3, 4)}
    state |= {"fused.bias": torch.randn(12), "in_proj": torch.randn(12, 4), "turned": torch.randn(2, 3)}
    to_ours(state, table, "a checkpoint")
    with pytest.raises(ValueError, match=f"a checkpoint: {message}"):
        to_ours(state | {name: torch.randn(shape)}, table, "a checkpoint")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn])
def test_quantised_parts_are_not_joined_with_others(dtype):
    state = _theirs()
    assert to_ours(state | {"layers.7.k_proj.bias": torch.ones(4).half()}, TABLE, "a checkpoint")
    with pytest.raises(ValueError, match=rf"layers\.7\.k_proj\.bias is {dtype}, but is joined with torch\.float32"):
        to_ours(state | {"layers.7.k_proj.bias": torch.ones(4).to(dtype)}, TABLE, "a checkpoint")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("bias"), "lacks: bias"),
        (lambda s: s.update(more=torch.ones(1)), "does not: more"),
        (lambda s: s.update(bias=torch.ones(3)), r"other shapes .*bias is \(3,\), not \(2,\)"),
        (lambda s: s.update(bias=torch.ones(2, dtype=torch.int8)), r"quantised.*bias is torch\.int8"),
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
