"""Losses of answers are those that scoring of choices gives, blind ones those without the image."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tiny_talk import talking
from tiny_vlm import tiny_vlm

from fastmllm.data.sample import Conversation, Sample, Turn
from fastmllm.data.shards import ShardSource, SourceConfig
from fastmllm.infer.answer_loss import AnswerLoss, answer_losses
from fastmllm.infer.respond import Responder
from fastmllm.models.mllm import MLLM
from fastmllm.models.vlm import VLM


@pytest.mark.parametrize("make", [lambda: tiny_vlm(0), lambda: talking("vit", "tiles", "mlp", "tokens").eval()])
def test_losses_equal_scores_and_skip_what_cannot_be_read(tmp_path: Path, make: Callable[[], VLM | MLLM]) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    lines = [{"image": name, "caption": "red"} for name in ("a.png", "b.png")] + [{"text": "blue"}]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, lines)))
    model = make()
    source = ShardSource(
        SourceConfig(name="s", path=str(tmp_path / "s.jsonl"), caption_prompt="what is this?"), cache=tmp_path / "c"
    )
    rows = list(answer_losses(source, AnswerLoss(model), batch_size=3))
    assert [getattr(row, "reason", None) for row in rows] == [None, "cannot be scored", None]
    first, _, text = rows
    sample = Sample(
        id="0", prompt="what is this?", answer="red", task="x", image=str(tmp_path / "a.png"), choices=("red",)
    )
    scores = Responder(model).score([sample, replace(sample, image=None)])
    tokens = len(Responder(model)._ids("red"))
    assert [first["loss"], first["blind"]] == pytest.approx([-s[0] / tokens for s in scores], rel=1e-4)
    assert first["loss"] != first["blind"]
    assert text["loss"] == text["blind"]
    turns = (Turn(prompt="what is this?", answer="red"), Turn(prompt="what is this?", answer="blue"))
    (both,) = AnswerLoss(model)([Conversation(id="1", turns=turns)])
    assert both > 0
