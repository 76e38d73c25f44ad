"""A batch without images still runs the image path in training, so that ranks stay in step, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_compositions import allowed, labels, picture, redrawn, tiny
from tiny_mllm import MODELS, oracle

from fastmllm.models.inputs import make_inputs
from fastmllm.models.mllm import MLLM

TEXT = [[1, 30, 31, 32], [1, 20]]


# each image path once, and each fusion
PATHS = list({parts[:3]: parts for parts in allowed()}.values())
FUSIONS = list({(parts[1], parts[3]): parts for parts in allowed()}.values())


@pytest.mark.parametrize("parts", dict.fromkeys(PATHS + FUSIONS), ids="-".join)
def test_text_alone_reaches_what_images_reach_with_zeros(parts: tuple[str, str, str, str]) -> None:
    model = redrawn(tiny(*parts)).train()
    try:
        shown = [[1, picture(1), 10, 11]]
        model.zero_grad()
        model(model.pack(shown, labels(shown))).backward()
        reached = {name for name, param in model.named_parameters() if param.grad is not None}
        model.zero_grad()
        batch = model.pack(TEXT, TEXT)
        loss = model(batch)
        loss.backward()
        found = {name: param.grad for name, param in model.named_parameters() if name in reached}
        assert [name for name, grad in found.items() if grad is None] == []
        images = [grad for name, grad in found.items() if name.startswith("images.")]
        assert images
        assert not any(grad.any() for grad in images if grad is not None)
        assert torch.equal(loss, model.eval()(batch))
    finally:
        model.zero_grad()
        model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_published_families_have_a_blank_image(name: str, tmp_path: Path) -> None:
    theirs, batch = oracle(name)
    theirs.save_pretrained(tmp_path)
    model = MLLM.from_pretrained(tmp_path).train()
    model(model.inputs({**batch, "labels": batch["input_ids"]})).backward()
    reached = {n for n, param in model.named_parameters() if n.startswith("images.") and param.grad is not None}
    model.zero_grad()
    text = torch.tensor([row[:2] for row in TEXT])
    loss = model(model.inputs({"input_ids": text, "labels": text}))  # no picture, as a processor hands it on
    loss.backward()
    assert torch.isfinite(loss)
    assert {n for n, param in model.named_parameters() if n.startswith("images.") and param.grad is not None} == reached
    calls: list[int] = []
    model.eval().images.vision.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    alone = model(make_inputs(TEXT, labels=TEXT))
    assert calls == []
    for param in model.images.parameters():
        param.ds_id = 0  # as under ZeRO-3: then a rank of text keeps step in a validation too
    assert torch.equal(model(make_inputs(TEXT, labels=TEXT)), alone)
    assert len(calls) == 1
