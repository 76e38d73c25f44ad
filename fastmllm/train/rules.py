"""Rules of a stage: which roles and parameters learn, how fast, and what of them is recomputed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from fastmllm.models.recompute import layers_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Say how a role, or what a pattern matches, learns.

    Args:
        lr: learning rate; 0 freezes.
        weight_decay: for parameters of two or more dimensions; None = the stage's.
        checkpointing: compute the role's layers again in the backward pass instead of keeping their activations; of use
            also for a frozen role that gradients pass through.
    """

    lr: float
    weight_decay: float | None = None
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"rule: weight_decay ({self.weight_decay}) must be finite and not negative")


Rules = Mapping[str, float | Rule]


def roles_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return role -> names of its parameters; nothing where a model names no roles."""
    roles = getattr(model, "roles", None)
    return {} if roles is None else dict(roles())


def named_by(key: str, names: Sequence[str], roles: Mapping[str, Sequence[str]]) -> Sequence[str]:
    """Return the names that a role, or else a pattern, stands for.

    Raises:
        ValueError: none; lists the model's roles, or near names.
    """
    if key in roles:
        return roles[key]
    found = [name for name in names if fnmatchcase(name, key)]
    if not found and key.isidentifier() and roles:
        raise ValueError(f"{key!r} is no role of this model; it has {', '.join(roles)} (patterns look like {key}.*)")
    if not found:
        near = difflib.get_close_matches(key.rstrip("*."), _prefixes(names), n=4, cutoff=0.4) or names[:4]
        raise ValueError(f"rule {key!r} matches no parameter; near names: {', '.join(near)}")
    return found


def apply_rules(
    model: nn.Module,
    rules: Rules,
    *,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    frozen: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Let the parameters that a rule names learn, freeze all others.

    Args:
        model: its parameters' requires_grad is set; a tied parameter answers to each of its names.
        rules: learning rate, or `Rule`, by role or fnmatch pattern; the last match wins, a rate of 0 freezes.
        weight_decay: for parameters of two or more dimensions, where a rule has none of its own.
        betas, eps: of AdamW, written into the groups.
        frozen: names that no rule trains: what learns through adapters instead.

    Returns:
        optimizer groups: name (its role or pattern), params, names, lr, weight_decay, betas, eps.

    Raises:
        ValueError: a rule matches no parameter (lists near names), or every match was overridden, or none learns, or
            a pattern is to be recomputed.
    """
    names, roles = [name for name, _ in model.named_parameters(remove_duplicate=False)], roles_of(model)
    params = dict(model.named_parameters(remove_duplicate=False))
    chosen: dict[nn.Parameter, tuple[str, str]] = {}  # parameter -> its first name, the rule that won
    for key, rule in rules.items():
        if isinstance(rule, Rule) and rule.checkpointing and key not in roles:
            have = ", ".join(roles) or "this model has none"
            raise ValueError(f"rule {key!r}: checkpointing is of a role, not of a pattern; roles: {have}")
        for name in named_by(key, names, roles):
            if name not in frozen:
                chosen[params[name]] = (name, key)
    for name in reversed(names):
        if params[name] in chosen:
            chosen[params[name]] = (name, chosen[params[name]][1])
    groups: list[dict[str, Any]] = []
    for pattern, rule in rules.items():
        rate = rule.lr if isinstance(rule, Rule) else rule
        decays = rule.weight_decay if isinstance(rule, Rule) and rule.weight_decay is not None else weight_decay
        mine = {first: param for param, (first, winner) in chosen.items() if winner == pattern}
        if not mine:
            raise ValueError(f"rule {pattern!r} decides nothing: later rules override all that it matches; remove it")
        for decay in dict.fromkeys((decays, 0.0)):
            part = {name: param for name, param in mine.items() if (decays if param.ndim >= 2 else 0.0) == decay}
            if part and rate > 0:
                groups.append(
                    {
                        "name": pattern,
                        "names": list(part),
                        "params": list(part.values()),
                        "lr": float(rate),
                        "weight_decay": decay,
                        "betas": tuple(betas),
                        "eps": eps,
                    }
                )
    if not groups:
        raise ValueError(f"no parameter learns: every rule has rate 0 ({', '.join(rules)})")
    learning = {param for group in groups for param in group["params"]}
    for param in model.parameters():
        param.requires_grad_(param in learning)
    return groups


def _prefixes(names: Iterable[str]) -> list[str]:
    """All dotted prefixes of names, so that a wrong module name finds its neighbours."""
    seen: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            seen[".".join(parts[:end])] = None
    return list(seen)


def recomputed_by(model: nn.Module, rules: Rules) -> dict[str, list[nn.Module]]:
    """Return role -> modules that its rule recomputes: a connector as it is, the layers of every other role."""
    roles = roles_of(model)
    return {
        key: layers_of(model, roles[key], whole=key == "connector")
        for key, rule in rules.items()
        if isinstance(rule, Rule) and rule.checkpointing and key in roles
    }
