"""Captions come from the responder, prompt and images as given."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from tiny_vlm import tiny_vlm

from fastmllm.infer.captioner import Captioner
from fastmllm.infer.respond import Responder


def test_a_caption_is_the_model_s_answer_to_the_prompt(tmp_path: Path) -> None:
    names = []
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{i}.png")
        names.append(str(tmp_path / f"{i}.png"))
    responder = Responder(tiny_vlm(0))
    found = Captioner(responder, "what is this?", max_new_tokens=3)(names)
    assert found == [responder.ask(name, "what is this?", 3) for name in names]
