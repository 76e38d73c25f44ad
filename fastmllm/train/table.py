"""The table that a stage prints before its first step: what learns, how fast, what is recomputed, what is frozen."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from torch import nn

from fastmllm.train.rules import roles_of

COLUMNS = ("module", "role", "parameters", "trainable", "lr", "decay", "checkpointing")


@dataclass(frozen=True, slots=True)
class _Kind:
    """What parameters of one row have in common; a rule's decay is its matrices', whatever else it rules."""

    role: str
    lr: float
    decay: float
    recomputed: bool


def stage_table(
    model: nn.Module, groups: Sequence[Mapping[str, Any]], title: str, recomputed: Collection[str] = ()
) -> Table:
    """Draw what learns and what is frozen, by module; neighbours of one kind share a row.

    Args:
        model: may name roles.
        groups: of `apply_rules`.
        title: above it.
        recomputed: roles that are computed again in the backward pass.
    """
    role_of = {name: role for role, names in roles_of(model).items() for name in names}
    decays: dict[str, float] = {}
    for group in groups:
        decays[group["name"]] = max(decays.get(group["name"], 0.0), group["weight_decay"])
    learns = {param: (group["lr"], decays[group["name"]]) for group in groups for param in group["params"]}
    named = {}
    for name, param in model.named_parameters():
        role = role_of.get(name, "")
        named[name] = (param.numel(), _Kind(role, *learns.get(param, (0.0, 0.0)), role in recomputed))
    table = Table(title=title)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("module", "role", "checkpointing") else "right")
    for label, count, kind in _rows("", named):
        rate = (f"{count:,}", f"{kind.lr:g}", f"{kind.decay:g}") if kind.lr else ("-", "frozen", "-")
        table.add_row(label, kind.role, f"{count:,}", *rate, "yes" if kind.recomputed else "")
    total = sum(count for count, _ in named.values())
    learning = sum(count for count, kind in named.values() if kind.lr)
    table.add_section()
    table.add_row("total", "", f"{total:,}", f"{learning:,}", f"{100 * learning / max(1, total):.2f} %")
    return table


def _rows(prefix: str, named: Mapping[str, tuple[int, _Kind]]) -> list[tuple[str, int, _Kind]]:
    """Split a module until its parameters are of one kind; merge neighbours whose labels differ in a number."""
    children: dict[str, dict[str, tuple[int, _Kind]]] = {}
    for name, value in named.items():
        children.setdefault(name[len(prefix) :].split(".")[0], {})[name] = value
    rows: list[tuple[str, int, _Kind]] = []
    start = None  # first number of the run that the last row stands for
    for child, inner in children.items():
        label, kinds = prefix + child, {kind for _, kind in inner.values()}
        if len(kinds) > 1:
            rows += _rows(label + ".", inner)
            start = None
            continue
        count, kind = sum(size for size, _ in inner.values()), kinds.pop()
        if child.isdigit() and start is not None and rows[-1][2] == kind:
            rows[-1] = (f"{prefix}{start}-{child}", rows[-1][1] + count, kind)
        else:
            rows.append((label, count, kind))
            start = child if child.isdigit() else None
    return rows
