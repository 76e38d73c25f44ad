"""Tiny compositions with words, and shards of talks whose pictures have several sizes."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

from tiny_compositions import redrawn, tiny
from tiny_shards import png, talk, write_tar
from tiny_vlm import tiny_tokenizer

from fastmllm.data.shards import SourceConfig
from fastmllm.models.composition import to_json
from fastmllm.models.mllm import MLLM
from fastmllm.models.talk import TalkConfig

SIZES = ((20, 28), (24, 16), (16, 40), (32, 32))


def talking(*parts: str) -> MLLM:
    """Return a composition that can be talked to, all of it frozen, in training mode."""
    language = tiny(*parts).language
    words = tiny_tokenizer()
    config = tiny(*parts, language=replace(language, vocab_size=words.get_vocab_size()), image_token_id=0)
    model = copy.deepcopy(redrawn(config))
    model.config = TalkConfig(composition=to_json(config), tokenizer="tiny", image_lead="<", dtype="float32")
    model.tokenizer = words
    return model.requires_grad_(False).train()


def talks(folder: Path) -> SourceConfig:
    """Write talks with none, one and two pictures: one of them damaged, one missing, one too narrow to be taken."""
    members: list[tuple[str, object]] = []
    for i in range(12):
        members.append((f"{i}.json", talk("What is this?", "red" * (1 + i % 5), "And?", "blue", images=i % 3)))
        for k in range(i % 3):
            size = (4, 1000) if i == 10 else SIZES[(i + k) % 4]
            members.append((f"{i}.{k}.png", png(20 * i, size)[: -30 if i == 7 else None]))
    write_tar(folder / "talks.tar", members)
    return SourceConfig(name="talks", path=str(folder / "talks.tar"))


def listed(folder: Path) -> dict[str, tuple[str, str]]:
    """Return key -> reason and detail of what a run left out."""
    lines = (folder / "skipped.jsonl").read_text().splitlines()
    return {line["key"]: (line["reason"], line["detail"]) for line in map(json.loads, lines)}
