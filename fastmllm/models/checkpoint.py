"""A multimodal checkpoint: how its family names tensors, and what must survive from reading to writing."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.models.vision import VisionConfig, VisionTransformer
from fastmllm.models.weights.mapping import FLOATS, Rule, Shape, fill, their_name, to_ours, to_theirs
from fastmllm.models.weights.towers import take_spare

_log = logging.getLogger(__name__)

HEAD, TABLE, VISION = "language.lm_head.weight", "language.model.embed_tokens.weight", "images.vision."
SIDECARS = ("*.json", "*.jinja", "*.txt", "*.model")  # tokenizer, processor, chat template; never code
NOT_SIDECARS = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a checkpoint of the family is written.

    Args:
        rules: names and forms, under the names of the files that transformers writes today.
        aliases: (older prefix, a newer one), applied as long as one fits: each tensor is written as it was read.
        unused: patterns of tensors that this model does not compute with, and their shapes; kept, and written back.
        whole: the encoder with all that files hold of it: blocks behind the layer that is used, a norm; what is not
            built is kept, and written back. None where all of it is built.
        tied: the head is the embedding table and has no tensor of its own.
    """

    rules: Sequence[Rule]
    aliases: Sequence[tuple[str, str]] = ()
    unused: Mapping[str, Shape] = field(default_factory=dict)
    whole: VisionConfig | None = None
    tied: bool = False


@dataclass(slots=True)
class Checkpoint:
    """A model's file, apart from what is computed with.

    Args:
        raw: config.json.
        layout: of its tensors.
        rest: tensors that nothing computes with, under the checkpoint's names.
        spare: those of parts that are not built, under ours.
        names: today's name of a tensor -> the one that it was read under.
        folder: where it was read.
    """

    raw: dict[str, Any]
    layout: Layout
    rest: dict[str, Tensor] = field(default_factory=dict)
    spare: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None

    def translate(self, state: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
        """Return a file's tensors under our names, the spare ones among them; the rest is kept here.

        Raises:
            ValueError: unknown names, or two that are one tensor.
        """
        today: dict[str, Tensor] = {}
        for name, tensor in state.items():
            new = _today(name, self.layout.aliases)
            if new in today:
                raise ValueError(
                    f"fastmllm::MLLM: {origin} holds one tensor twice, as {self.names.get(new, new)} and as {name}: "
                    "remove one of them"
                )
            today[new] = tensor
            if new != name:
                self.names[new] = name
        ours, self.rest = to_ours(today, self.layout.rules, origin, self.layout.unused)
        return ours

    def fill(self, model: nn.Module, ours: dict[str, Tensor], origin: str, dtype: torch.dtype | None) -> None:
        """Give a model its tensors, and keep those of parts that it lacks.

        Raises:
            ValueError: tensors are missing, too many, of another shape, or of several dtypes; the message names them.
        """
        if self.layout.whole is not None:
            vision = model.get_submodule(VISION.removesuffix("."))
            assert isinstance(vision, VisionTransformer)
            self.spare = take_spare(ours, vision, self.layout.whole, origin, VISION, self._their)
        ours, self.spare, self.rest = (
            {name: t.to(dtype) if dtype is not None and t.is_floating_point() else t for name, t in part.items()}
            for part in (ours, self.spare, self.rest)
        )
        fill(model, ours, origin, self._their)
        self._one_dtype(ours, origin)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a model's weights under the checkpoint's names, with what is kept apart."""
        ours = model.state_dict()
        if self.layout.tied:
            del ours[HEAD]
        theirs = to_theirs(ours | self.spare, self.layout.rules, self.rest)
        return {self.names.get(name, name): tensor for name, tensor in theirs.items()}

    def _their(self, name: str) -> str:
        """Return the name under which a tensor of ours is, or would be, in the file."""
        theirs = their_name(name, self.layout.rules)
        return self.names.get(theirs, theirs)

    def _one_dtype(self, ours: Mapping[str, Tensor], origin: str) -> None:
        """Refuse what would compute nothing, or only fail when it is computed with."""
        first: dict[torch.dtype, str] = {}
        for name, tensor in ours.items():
            if tensor.is_floating_point():
                first.setdefault(tensor.dtype, name)
        said = ", ".join(f"{self._their(name)} in {dtype}" for dtype, name in first.items())
        if len(first) > 1:
            raise ValueError(f"fastmllm::MLLM: {origin} has weights of several dtypes: {said}; say one with dtype=")
        if not first.keys() <= FLOATS:
            raise ValueError(f"fastmllm::MLLM: {origin} has weights in a dtype that is not computed here: {said}")

    def config(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return config.json for weights of a dtype."""
        name = str(dtype).removeprefix("torch.")
        return _with_dtype(self.raw, name) | {"dtype": name}

    def copy_sidecars(self, folder: Path) -> None:
        """Copy the files of the processor; links that lead out of the checkpoint are left, but for the hub's cache."""
        if self.folder is None or self.folder.resolve() == folder.resolve():
            return
        source = self.folder.resolve()
        inside = [source]
        if source.parent.name == "snapshots":  # the hub's cache: snapshots/<revision>/* lead to blobs/*
            inside.append(source.parent.parent / "blobs")
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted({f for pattern in SIDECARS for f in source.glob(pattern)}):
            if file.name in NOT_SIDECARS or not file.is_file():
                continue
            if any(file.resolve().is_relative_to(place) for place in inside):
                shutil.copyfile(file, folder / file.name)
            else:
                _log.warning("fastmllm::MLLM: %s leads out of its folder: not copied to %s", file, folder)


def tie(ours: dict[str, Tensor]) -> bool:
    """Make head and embedding table one tensor where a file has either of them, or one twice.

    Args:
        ours: a file's tensors, under our names; changed.

    Returns:
        Whether they are one: transformers unties two that differ, whatever config.json says.
    """
    head, table = ours.get(HEAD), ours.get(TABLE)
    if head is not None and table is not None and not (head.dtype == table.dtype and torch.equal(head, table)):
        return False
    one = table if head is None else head
    if one is not None:
        ours[HEAD] = ours[TABLE] = one
    return True


def _today(name: str, aliases: Sequence[tuple[str, str]]) -> str:
    """Give a tensor its name of today."""
    for old, new in aliases:
        if name.startswith(old):
            return _today(new + name.removeprefix(old), aliases)
    return name


def _with_dtype(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Say another dtype wherever a config.json says one, under today's key."""
    said = raw.keys() & {"dtype", "torch_dtype"}
    kept = {
        key: _with_dtype(value, name) if key.endswith("_config") and isinstance(value, Mapping) else value
        for key, value in raw.items()
        if key not in said
    }
    return kept | ({"dtype": name} if said else {})
