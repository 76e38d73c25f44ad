"""Low-rank adapters (LoRA, arXiv 2106.09685) for roles of a model, by `peft`; the only file that imports it.

A role under LoRA learns through adapters on its linear layers, at the rate of its rule; its own weights stay. At the
end of the stage they are written as a peft adapter, and merged role by role: names and later stages are plain again.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastmllm.train.checkpoint import CheckpointError, atomic_file
from fastmllm.train.rules import roles_of

NAME = "default"
STARTS_AT_ZERO = f"*.lora_A.{NAME}.*"  # B is zero at first, so that A gets no gradient


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig:
    """Say which roles learn through adapters, and how large those are.

    Args:
        roles: at least one; each needs a rule of the stage, whose rate and decay its adapters have.
        targets: last words of the linear layers' names, such as q_proj; empty = all linear layers of the roles.
        r: rank.
        alpha: the product of both matrices is multiplied by alpha / r.
        dropout: in front of the adapters.
    """

    roles: tuple[str, ...]
    targets: tuple[str, ...] = ()
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.roles or self.r < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"lora: needs roles ({list(self.roles)}), r ({self.r}) of at least 1, alpha ({self.alpha}) above 0 and "
                f"dropout ({self.dropout}) in 0..1"
            )


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ImportError(
            f"a stage with lora needs peft, and importing it failed ({error}): pip install peft"
        ) from error


class Adapters:
    """Adapters on a model, put there when this is made.

    Args:
        model: whole, on any device; changed in place until `merge` or `remove`.
        config: where and how large.
        seed: of their first weights.

    Raises:
        ValueError: a role that the model has not, or one without such a linear layer.
        ImportError: peft is missing; says what to install.
    """

    def __init__(self, model: nn.Module, config: LoRAConfig, seed: int = 0) -> None:
        peft, roles = _peft(), roles_of(model)
        self.model, self.config = model, config
        self.places: dict[str, list[str]] = {}  # role -> names of its adapted modules
        for role in config.roles:
            if role not in roles:
                raise ValueError(f"lora: {role!r} is no role of this model; it has {', '.join(roles) or 'none'}")
            names, part = _linear(model, roles[role]), config.targets
            self.places[role] = [name for name in names if not part or name.rpartition(".")[2] in part]
            if not self.places[role]:
                have = ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"
                raise ValueError(
                    f"lora: role {role!r} has no linear layer of {list(part) or 'any name'}; it has: {have}"
                )
        chosen = [name for names in self.places.values() for name in names]
        made = peft.LoraConfig(
            r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=chosen, bias="none"
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(made, model, adapter_name=NAME)

    def frozen(self) -> set[str]:
        """Return the names of the adapted roles' own parameters, which no rule trains."""
        roles = roles_of(self.model)
        return {name for role in self.places for name in roles[role] if ".lora_" not in name}

    def save(self, folder: Path) -> None:
        """Write the adapters as peft does: `PeftModel.from_pretrained` puts them on the model as it was before.

        Args:
            folder: gets adapter_model.safetensors and adapter_config.json, each written whole or not at all.

        Raises:
            CheckpointError: a file could not be written; an earlier one is intact.
        """
        state = _peft().get_peft_model_state_dict(self.model, adapter_name=NAME)
        tensors = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in state.items()}
        made: Any = self.model.peft_config
        config = made[NAME].to_dict() | {"inference_mode": True}
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / "adapter_model.safetensors") as temporary:
            save_file(tensors, temporary)
        with atomic_file(folder / "adapter_config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2, sort_keys=True, default=sorted), encoding="utf-8")

    @torch.no_grad()
    def merge(self, logits: Callable[[], Tensor]) -> None:
        """Add the adapters to the weights and take them off, checking one role after the other.

        Args:
            logits: what the model computes now, of one batch in evaluation mode.

        Raises:
            CheckpointError: a role whose merged weights, or the logits with them, are not those of its adapters.
        """
        for role, names in self.places.items():
            before = logits()
            for name in names:
                layer: Any = self.model.get_submodule(name)
                self._merge_one(role, name, layer)
                self._put_back(name, layer)
            after = logits()
            scale = before.float().norm().clamp(min=torch.finfo(torch.float32).tiny)
            off = float((after.float() - before.float()).norm() / scale)
            if not off <= torch.finfo(before.dtype).eps ** 0.5:
                raise CheckpointError(
                    f"lora: with role {role!r} merged, outputs differ by {off:.2g} of their size from those with its "
                    "adapters; the adapters are saved and not merged"
                )
        del self.model.peft_config

    def _merge_one(self, role: str, name: str, layer: Any) -> None:
        weight = layer.get_base_layer().weight
        delta = layer.scaling[NAME] * (layer.lora_B[NAME].weight.double() @ layer.lora_A[NAME].weight.double())
        expected = weight.double() + delta
        layer.merge(safe_merge=True)
        allowed = torch.finfo(weight.dtype).eps * (expected.abs() + delta.abs().max())
        if not bool(((weight.double() - expected).abs() <= allowed).all()):
            raise CheckpointError(
                f"lora: role {role!r}: the merged weight of {name} is not its own plus its adapter's; the adapters are "
                "saved and not merged"
            )
        weight.requires_grad_()  # it is what the stage changed: it goes into the exported weights

    def remove(self) -> None:
        """Take the adapters off and leave the weights as they were; nothing where they are off."""
        for names in self.places.values():
            for name in names:
                layer: Any = self.model.get_submodule(name)
                if hasattr(layer, "get_base_layer"):
                    self._put_back(name, layer)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config

    def _put_back(self, name: str, layer: Any) -> None:
        parent, _, last = name.rpartition(".")
        setattr(self.model.get_submodule(parent), last, layer.get_base_layer())


def _linear(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Return the names of the linear layers that parameters belong to."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return [owner for owner in owners if isinstance(model.get_submodule(owner), nn.Linear)]
