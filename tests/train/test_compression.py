"""Training with compressors in every place: the same losses under ZeRO-0 and ZeRO-3, and their own weights learn."""

from __future__ import annotations

import pytest
import torch
from tiny_vlm import colour_photos, tiny_vlm
from train_toy import trainer

from fastmllm.compression import METHODS, Placement
from fastmllm.data.sample import Sample
from fastmllm.infer.respond import collate_for

PLACES = {  # name -> placement, image places in the text
    "merged inside of the encoder": (lambda: Placement(merge=9), 9),
    "chosen by attention": (lambda: Placement.of("connector", METHODS["topk"], 5, scorer="received", layer=-1), 5),
    "nested queries": (lambda: Placement.of("connector", METHODS["attend"], 4, design="mqt", width=24, num_heads=2), 4),
    "inside of the decoder": (lambda: Placement.of("language:1", METHODS["topk"], 0.25, scorer="last_row"), 16),
}


def train(out, photos, name, zero_stage):
    place, keep = PLACES[name]
    model = tiny_vlm()
    torch.manual_seed(1)
    model.placement = place()
    model.config = model.config.__class__(image_size=32, visual_tokens=keep, train_vision=True, dtype="float32")

    def batch(step):
        pictures = sorted(photos.rglob("*.png"))[3 * step : 3 * step + 3]
        samples = [Sample(id=str(p), prompt="What is this?", answer=p.parent.name, task="name", image=str(p))
                   for p in pictures]  # fmt: skip
        samples.append(Sample(id="text", prompt="What is this?", answer="red", task="name", image=None))
        return collate_for(model, samples, keep=keep, image_size=32, load_pixels=True, with_answers=True)

    losses = []
    rules = {"connector.*": 1e-2, "vision.*": 1e-2, "language.*": 1e-2}
    rules |= {"compressors.*": 1e-2} if any(True for _ in model.compressors.parameters()) else {}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = trainer(out, model, engine={"zero_stage": zero_stage}, batches=batch, on_step=losses.append,
                  changes={"steps": 3, "trainable": rules})  # fmt: skip
    run.run()
    same = [name for name, p in model.named_parameters() if torch.equal(p.cpu(), before[name])]
    return [record.loss for record in losses], same


@pytest.mark.parametrize("name", PLACES)
def test_zero_3_is_plain_training(tmp_path, name):
    photos = colour_photos(tmp_path / "photos")
    plain, still = train(tmp_path / "zero0", photos, name, 0)
    sharded, _ = train(tmp_path / "zero3", photos, name, 3)
    assert sharded == pytest.approx(plain, rel=1e-5)
    assert len(set(plain)) == 3
    assert not still, still
