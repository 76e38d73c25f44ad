"""Which parameters of a model play which part: what a recipe trains, freezes, recomputes or adapts by name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

ROLES = ("vision", "connector", "cross_attention", "llm", "embeddings")
LANGUAGE = {  # prefix -> role
    "language.": "llm",
    "language.cross_layers.": "cross_attention",
    "language.inner_layers.": "cross_attention",
    "language.model.embed_tokens.": "embeddings",
    "language.model.embed_positions.": "embeddings",
    "language.lm_head.": "embeddings",
}


def named_roles(model: nn.Module, prefixes: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Share out a model's parameters.

    Args:
        model: a tied parameter has each of its names.
        prefixes: prefix of names -> role; the longest one decides.

    Returns:
        role -> names of its parameters, each parameter in one role; roles without parameters are left out.
    """
    found: dict[str, list[str]] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        fits = [prefix for prefix in prefixes if name.startswith(prefix)]
        assert fits, f"{type(model).__name__}: {name} has no role"
        found.setdefault(prefixes[max(fits, key=len)], []).append(name)
    order = {role: place for place, role in enumerate(dict.fromkeys((*ROLES, *prefixes.values())))}
    return {role: tuple(found[role]) for role in sorted(found, key=order.__getitem__)}
