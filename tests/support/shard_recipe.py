"""A recipe whose stage learns from tiny shards."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from tiny_shards import png, talk, write_tar

from fastmllm.data.build import Splits
from fastmllm.recipe import Recipe

NOTHING = Splits(train={}, eval={}, concepts=(), groups=(), licences={}, notes=(), skipped=Counter(), unseen_team=False)

RECIPE = """
name: shards
model: {{image_size: 32, visual_tokens: 4, dtype: float32}}
stages:
  - name: instruct
    steps: 4
    batch_size: 3
    trainable: {{"connector.*": 1e-2}}
    visual_tokens: [1, 4]
    balance_steps: {window}
    sources:
      - {{name: talks, path: "{folder}/talks.tar", weight: 3}}
      - {{name: pairs, path: "{folder}/pairs.jsonl", weight: 1}}
engine: {{zero_stage: 1, workers: {workers}}}
"""


def recipe_of(folder: Path, workers: int = 0, window: int = 0) -> Recipe:
    """Talks with none, one and two images, one of them torn, and JSONL with one image missing."""
    members: list[tuple[str, object]] = []
    for i in range(8):
        members.append((f"{i}.json", talk("What is this?", "red", "And?", "blue", images=i % 3)))
        members += [(f"{i}.{k}.png", png(40 * i, (32, 32))[: -30 if i == 5 else None]) for k in range(i % 3)]
    write_tar(folder / "talks.tar", members)
    (folder / "p.png").write_bytes(png())
    lines = [talk("What is this?", "green", images=1) | {"image": name} for name in ("p.png", "gone.png", "p.png")]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(folder=folder, workers=workers, window=window))
    return Recipe.load(path)
