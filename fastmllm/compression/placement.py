"""Where in a model tokens are compressed: inside of the encoder, at the connector, or between layers of the decoder."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastmllm.compression.budget import Budget
from fastmllm.compression.compressor import Compressor


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """What is compressed where; the empty one compresses nothing.

    Args:
        merge: tokens that Token Merging leaves of each image behind the encoder's last block.
        connector: what runs between encoder and connector.
        stages: (layer, compressor): what runs in front of that layer of the language model, 0 the first one.
    """

    merge: Budget | None = None
    connector: Compressor | None = None
    stages: tuple[tuple[int, Compressor], ...] = ()

    @property
    def compressors(self) -> list[Compressor]:
        """All of them, the connector's first."""
        return [*([] if self.connector is None else [self.connector]), *(compressor for _, compressor in self.stages)]

    @classmethod
    def of(cls, at: str, method: type[Compressor], keep: Budget | Sequence[float], **options: Any) -> Placement:
        """Build a placement from one line of configuration.

        Args:
            at: "vision", "connector", "language:2", or several layers "language:8/16/24".
            method: the compressor's class, a value of `METHODS`; inside of the encoder `BipartiteMerge` alone.
            keep: K, a fraction or one K an image; with several layers one number or fraction each, of the tokens in
                front of the first.
            options: of the class. Inside of the language model `layer` is not taken: it is the layer in front.

        Raises:
            ValueError: an unknown place, a method that has no place there, or another number of budgets than layers.
        """
        build: Callable[..., Compressor] = method
        if at == "vision":
            if method.name != "bipartite_merge" or options not in ({}, {"metric": "keys"}):
                raise ValueError(
                    "Placement: inside of the encoder tokens merge by their keys: bipartite_merge without options, not "
                    f"{method.name} with {options}"
                )
            return cls(merge=keep)  # type: ignore[arg-type]
        if at == "connector":
            return cls(connector=build(keep, **{"position": "renumber", **options}))
        match = re.fullmatch(r"language:(\d+(?:/\d+)*)", at)
        if match is None:
            raise ValueError(f"Placement: {at!r} is no place: vision, connector, language:2 or language:8/16/24")
        layers = [int(layer) for layer in match[1].split("/")]
        budgets = [keep] if len(layers) == 1 else list(keep) if isinstance(keep, Sequence) else []
        if len(budgets) != len(layers):
            raise ValueError(f"Placement: {at} needs {len(layers)} budgets, got {keep!r}")
        stages = tuple((layer, build(budget, **options)) for layer, budget in zip(layers, budgets, strict=True))
        if stages[0][1].layer is not None and not layers[0]:
            raise ValueError(f"Placement: {method.name} judges by attention, and in front of layer 0 there is none")
        return cls(stages=stages)
