"""Prompt files: what a language model is told about an image, and how it is asked to speak of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fastmllm.data.conversation import RecordError
from fastmllm.data.instruct.questions import things_of
from fastmllm.data.instruct.replies import Messages

SHIPPED = Path(__file__).parent / "prompts"


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptFile:
    """A way to ask for instructions.

    Args:
        name: of the file, kept with every sample.
        language: of questions and answers.
        system: the rules.
        user: with {facts}, what is known of the image.
        seeds: (facts, reply) that show how it is done.
        shots: of them shown at a time, drawn by seed.
    """

    name: str
    language: str
    system: str
    user: str
    seeds: tuple[tuple[str, str], ...]
    shots: int

    def messages(self, facts: str, generator: np.random.Generator) -> Messages:
        """Return what the model is asked."""
        said = [{"role": "system", "content": self.system}]
        for place in generator.permutation(len(self.seeds))[: self.shots]:
            seed, reply = self.seeds[place]
            said += [{"role": "user", "content": self.user.replace("{facts}", seed)}]
            said += [{"role": "assistant", "content": reply}]
        return [*said, {"role": "user", "content": self.user.replace("{facts}", facts)}]


def load_prompt(name: str | Path) -> PromptFile:
    """Read a prompt file, or one that is shipped ("conversation_en", "detail_en", ...).

    Raises:
        ValueError: no such file, or sections that are missing.
    """
    path = SHIPPED / f"{name}.yaml" if not str(name).endswith((".yaml", ".yml")) else Path(name)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        seeds = tuple((str(seed["facts"]).strip(), str(seed["reply"]).strip()) for seed in raw.get("seeds", ()))
        found = PromptFile(
            name=path.stem, language=raw["language"], system=str(raw["system"]).strip(), user=str(raw["user"]),
            seeds=seeds, shots=int(raw.get("shots", len(seeds))),
        )  # fmt: skip
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
        raise ValueError(f"prompt {name}: {error.strerror}; give a .yaml file or one of {known}") from error
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        needs = "language, system, user with {facts}, and seeds of {facts, reply}"
        raise ValueError(f"{path}: needs {needs} ({type(error).__name__}: {error})") from error
    if "{facts}" not in found.user:
        raise ValueError(f"{path}: user {found.user!r} lacks {{facts}}, what is known of the image")
    return found


def facts_of(data: Mapping[str, Any]) -> str:
    """Say what a record knows of its image: captions a line each, then its boxes.

    Raises:
        RecordError: neither.
    """
    captions = data.get("captions") or [data.get("caption")]
    lines = [text.strip() for text in captions if isinstance(text, str) and text.strip()]
    with suppress(RecordError):
        lines += [f"{label}: {box}" for label, box in things_of(data)]
    if not lines:
        raise RecordError("wrong columns", f"neither caption(s) nor boxes; columns: {', '.join(map(str, data))[:200]}")
    return "\n".join(lines)
