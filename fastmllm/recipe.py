"""A recipe: one YAML file that says what to load, learn from, train, evaluate and sweep."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastmllm.bench.sweep import SweepConfig
from fastmllm.config import build, load_yaml
from fastmllm.data.build import DataConfig
from fastmllm.eval.runner import EvalConfig
from fastmllm.models.talk import TalkConfig
from fastmllm.models.vlm import ModelConfig
from fastmllm.train.engine import EngineConfig
from fastmllm.train.stages import StageConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The rooms' configurations, composed.

    Args:
        name: of the run, for headings.
        data, model, engine, eval, bench: see the rooms; a `model` with a folder or a composition is a `TalkConfig`.
        stages: trained one after the other, each from the weights of the one before.
        seed: of the connector's initial weights.
    """

    name: str
    stages: tuple[StageConfig, ...]
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig | TalkConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    bench: SweepConfig = field(default_factory=SweepConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"stages need distinct names and at least one stage, got {names}")

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe file; `overrides` are texts such as "data.num_concepts=24".

        Raises:
            ConfigError: names the key that is wrong, and the remedy.
        """
        return build(cls, load_yaml(path, overrides), Path(path).name)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
