from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from torch import nn
from train_toy import RULES, stage, toy

from fastmllm.train.rules import apply_rules
from fastmllm.train.stages import GradientCheck, set_modes
from fastmllm.train.table import stage_table


def learning(model: nn.Module) -> set[str]:
    return {name for name, param in model.named_parameters() if param.requires_grad}


def test_rules_freeze_everything_else() -> None:
    model = toy()
    groups = apply_rules(model, RULES, weight_decay=0.1)
    assert learning(model) == {
        name for name, _ in model.named_parameters() if name.startswith(("connector.", "language.blocks.1."))
    }
    assert {(group["name"], group["lr"], group["weight_decay"]) for group in groups} == {
        ("connector.*", 1e-2, 0.1),
        ("connector.*", 1e-2, 0.0),
        ("language.blocks.1.*", 1e-3, 0.1),
        ("language.blocks.1.*", 1e-3, 0.0),
    }
    for group in groups:
        assert all((param.ndim >= 2) == (group["weight_decay"] > 0) for param in group["params"])
    assert sum(len(group["params"]) for group in groups) == len(learning(model))


def test_a_later_rule_wins_and_zero_freezes() -> None:
    model = toy()
    groups = apply_rules(model, {"language.*": 1e-4, "language.blocks.[01].*": 1e-3, "language.embed.*": 0.0})
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert rates["language.blocks.0.up.weight"] == 1e-3
    assert rates["language.blocks.2.up.weight"] == rates["language.head.weight"] == 1e-4
    assert "language.embed.weight" not in rates
    assert not model.language.embed.weight.requires_grad


def test_a_tied_parameter_answers_to_both_names_once() -> None:
    model = toy()
    model.language.head.weight = model.language.embed.weight
    groups = apply_rules(model, {"language.head.*": 1e-3})
    assert [len(group["params"]) for group in groups] == [1]
    assert model.language.embed.weight.requires_grad


def test_an_unmatched_rule_names_its_neighbours() -> None:
    with pytest.raises(ValueError, match=r"'conector\.\*' matches no parameter; near names: connector"):
        apply_rules(toy(), {"conector.*": 1e-3})
    with pytest.raises(ValueError, match=r"'connector\.\*' decides nothing"):
        apply_rules(toy(), {"connector.*": 1e-3, "*": 1e-4})
    with pytest.raises(ValueError, match="every rule has rate 0"):
        apply_rules(toy(), {"connector.*": 0.0})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "steps"),
        ({"trainable": {}}, "nothing learns"),
        ({"trainable": {"a": float("nan")}}, "finite"),
        ({"schedule": "linear"}, "cosine or constant"),
        ({"warmup": 7}, "warmup"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"clip": -1.0}, "clip"),
    ],
)
def test_a_bad_stage_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage(**change)


def test_schedules() -> None:
    cosine = [stage(steps=10, warmup=2, final=0.1).factor(step) for step in range(11)]
    assert cosine[:3] == [0.5, 1.0, 1.0]
    assert cosine[6] == pytest.approx(0.55)
    assert cosine[10] == pytest.approx(0.1)
    assert [stage(schedule="constant", warmup=4).factor(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_frozen_parts_stand_still() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Dropout(0.5), nn.Linear(2, 2))
    apply_rules(model, {"2.*": 1e-3})
    model.eval()
    set_modes(model)
    assert [module.training for module in (model, model[0], model[0][1], model[1], model[2])] == [
        True, False, False, True, True,
    ]  # fmt: skip


def test_the_table_joins_neighbours() -> None:
    model = toy()
    groups = apply_rules(model, {"connector.*": 1e-2, "language.blocks.[12].*": 1e-3})
    console = Console(file=io.StringIO(), width=100)
    console.print(stage_table(model, groups, "title"))
    lines = [line.replace("│", " ").split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    block = sum(param.numel() for param in model.language.blocks[1].parameters())
    assert ["language.blocks.0", f"{block:,}", "-", "frozen", "-"] in lines
    assert ["language.blocks.1-2", f"{2 * block:,}", f"{2 * block:,}", "0.001", "0"] in lines
    assert any(line[:2] == ["connector", "544"] and line[-2] == "0.01" for line in lines)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch, self.aside = nn.Linear(2, 2), nn.Linear(2, 2)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.gate * self.branch(x)).sum()


def seen(model: nn.Module, rules: dict[str, float], may_be_zero: tuple[str, ...] = ()) -> None:
    check = GradientCheck(model, apply_rules(model, rules), may_be_zero)
    model(torch.ones(3, 2)).backward()
    check.verify([check.close()])


def test_the_gradient_check_names_what_did_not_learn() -> None:
    seen(Gated(), {"gate": 1e-3})
    with pytest.raises(RuntimeError, match=r"all-zero gradient: branch\.weight, branch\.bias .*may_be_zero"):
        seen(Gated(), {"gate": 1e-3, "branch.*": 1e-3})
    seen(Gated(), {"gate": 1e-3, "branch.*": 1e-3}, ("branch.*",))
    with pytest.raises(RuntimeError, match=r"not part of the loss: aside\.weight, aside\.bias"):
        seen(Gated(), {"gate": 1e-3, "aside.*": 1e-3}, ("aside.*",))
    with pytest.raises(ValueError, match="may_be_zero: rule 'brunch"):
        seen(Gated(), {"gate": 1e-3}, ("brunch.*",))


def test_the_gradient_check_joins_ranks_and_sees_strays() -> None:
    model = Gated()
    check = GradientCheck(model, apply_rules(model, {"gate": 1e-3, "branch.*": 1e-3}))
    check.close()
    check.verify(  # one rank reached what the other did not
        [
            {"gate": "reached", "branch.weight": "none", "branch.bias": "zero"},
            {"gate": "none", "branch.weight": "reached", "branch.bias": "reached"},
        ]
    )
    model.aside.weight.grad = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match=r"frozen, yet it has a gradient: aside\.weight"):
        check.verify([dict.fromkeys(("gate", "branch.weight", "branch.bias"), "reached")])
