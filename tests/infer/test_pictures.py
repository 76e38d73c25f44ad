"""Words and pictures of a sample become what the model reads; a picture of several samples is encoded once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_compositions import LANGUAGE, labels, picture, redrawn, tiny
from tiny_vlm import tiny_tokenizer

from fastmllm.data.sample import Conversation, Sample, Turn
from fastmllm.infer.pictures import pack_spelled, spell
from fastmllm.infer.respond import collate_for, template_of
from fastmllm.models.inputs import Inputs
from fastmllm.models.mllm import MLLM
from fastmllm.models.talk import TalkConfig

TOKENIZER = tiny_tokenizer()
SHARED = (
    ("vit", "tiles", "pixel_shuffle", "tokens"),
    ("vit", "fixed", "resampler", "flamingo"),
    ("mllama", "mllama", "none", "mllama"),
    ("qwen", "native", "merger", "deepstack"),
    ("vit", "dual", "mlp", "cogagent"),
)


def talking() -> MLLM:
    config = tiny(
        "vit", "fixed", "resampler", "flamingo", language=replace(LANGUAGE, vocab_size=TOKENIZER.get_vocab_size())
    )
    model = MLLM.from_config(config)
    model.tokenizer = TOKENIZER
    model.config = TalkConfig(
        folder="none", image_lead="<", image_end=">", prefix="<|im_start|>", middle=" Answer:", suffix="<|im_end|>"
    )
    return model.eval()


@pytest.fixture
def photo(tmp_path: Path) -> str:
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def test_what_is_read_and_what_is_scored(photo: str) -> None:
    model = talking()
    sample = Sample(id="a", prompt="What is this?", answer="red", task="name", image=photo)
    batch = collate_for(model, [sample, replace(sample, id="b", image=None)], with_answers=True)
    read = TOKENIZER.decode(batch.input_ids[: batch.cu_seqlens[1]].tolist(), skip_special_tokens=False)
    end = TOKENIZER.token_to_id("<|im_end|>")
    answer = [*TOKENIZER.encode("red", add_special_tokens=False).ids, end]
    scored = batch.plan.labels[batch.plan.labels != -100].tolist()
    assert scored == answer * 2
    assert batch.num_targets == 2 * len(answer)
    assert batch.ids == ["a", "b"]
    image = TOKENIZER.decode([5], skip_special_tokens=False)
    assert read == f"<|im_start|><{image}>What is this? Answer:red<|im_end|>"
    asked = collate_for(model, [sample], with_answers=False)
    assert asked.num_targets == 0
    assert len(asked.input_ids) == batch.cu_seqlens[1] - len(answer)


def test_other_answers_take_the_place_of_a_samples_own(photo: str) -> None:
    sample = Sample(id="a", prompt="What is this?", answer="red", task="name", image=photo)
    batch = collate_for(talking(), [sample], with_answers=True, answers=[[7, 8]])
    assert batch.plan.labels[batch.plan.labels != -100].tolist() == [7, 8]


def test_a_conversation_of_several_pictures_and_an_unscored_one(photo: str) -> None:
    model = talking()
    turns = (Turn(prompt="<image>and <image>same?", answer="yes"), Turn(prompt="Sure?", answer="no"))
    row = spell(Conversation(id="c", turns=turns, images=(photo, photo)), model, template_of(model))
    assert row.tokens.count(None) == 2
    batch = pack_spelled(model, [row])
    assert batch.images is not None
    assert batch.images["images" if "images" in batch.images else "tiles"] == 1
    assert batch.num_targets == sum(label != -100 for label in row.labels) == 4
    assert pack_spelled(model, [row], scored=False).num_targets == 0


def encoded(inputs: Inputs) -> int:
    return sum(value.numel() for value in (inputs.images or {}).values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("parts", SHARED, ids="-".join)
def test_a_picture_in_several_places_is_encoded_once(parts: tuple[str, ...]) -> None:
    model = redrawn(tiny(*parts))
    a, b = picture(1, 20, 28), picture(2, 16, 16)
    places: list[list[Any]] = [[1, a, 10, b, 11, 12], [1, a, 10, b, 13], [1, b, 20, 21], [1, 30]]
    copies = [[item.copy() if hasattr(item, "copy") else item for item in sample] for sample in places]
    once, each = model.pack(places, labels(places)), model.pack(copies, labels(copies))
    assert once.shown is not None
    assert each.shown is None
    assert encoded(once) < encoded(each)
    with torch.no_grad():
        expected, found = model.log_probs(each), model.log_probs(once)
        tokens = model.target_log_probs(once)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(tokens.sum(), expected.sum(), atol=1e-4)
    assert torch.allclose(model(once), -expected.sum(), atol=1e-4)
