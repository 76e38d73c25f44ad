"""A sample as a pair: its caption between tokens, cut to fit, its image as a square; what is no pair is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_shards import png
from tiny_vlm import tiny_tokenizer

from fastmllm.data.captions import CaptionFormat
from fastmllm.data.images import ImageError
from fastmllm.data.sample import Conversation, Sample, Turn
from fastmllm.data.text import TextError, encode

FORM = CaptionFormat(tokenizer=tiny_tokenizer(), image_size=8, max_tokens=6, first=(7,), last=(9,))


def sample(image: Path | None, text: str) -> Sample:
    return Sample(id=text, prompt="", answer=text, task="caption", image=None if image is None else str(image))


def test_pairs_are_packed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(3, (4, 6)))
    (tmp_path / "b.png").write_bytes(png(200))
    first, second = sample(tmp_path / "a.png", "red"), sample(tmp_path / "b.png", "green and blue and white and more")
    talk = Conversation(id="talk", turns=(Turn(prompt="<image>?", answer="red"),), images=(str(tmp_path / "a.png"),))
    batch = FORM.batch([FORM.read(item) for item in (first, second, talk)], draw=4)
    words = [encode(FORM.tokenizer, text) for text in ("red", "green and blue and white and more", "red")]
    expected = [[7, *ids[:4], 9] for ids in words]
    assert len(words[1]) > 4
    assert batch.input_ids.tolist() == [token for row in expected for token in row]
    assert batch.cu_seqlens.diff().tolist() == [len(row) for row in expected]
    assert batch.position_ids.tolist() == [place for row in expected for place in range(len(row))]
    assert batch.pixels.shape == (3, 8, 8, 3)
    assert batch.image_ids[0] == batch.image_ids[2] != batch.image_ids[1]
    assert (batch.num_targets, batch.max_seqlen, batch.draw) == (3, 6, 4)
    assert torch.equal(batch.pixels[0], batch.pixels[2])


def test_what_is_no_pair_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    both = Conversation(id="two", turns=(Turn(prompt="<image><image>", answer="a"),), images=("a.png", "b.png"))
    for item in (sample(None, "red"), sample(tmp_path / "a.png", ""), both):
        with pytest.raises(TextError, match="one image and its caption"):
            FORM.read(item)
    with pytest.raises(TextError, match="special token"):
        FORM.read(sample(tmp_path / "a.png", "<|im_end|>"))
    with pytest.raises(TextError, match="outside of the model's 3"):
        replace(FORM, vocab_size=3).read(sample(tmp_path / "a.png", "red"))
    with pytest.raises(ImageError):
        FORM.read(sample(tmp_path / "gone.png", "red"))
    with pytest.raises(ValueError, match="leave no room"):
        replace(FORM, max_tokens=2)
    with pytest.raises(ValueError, match="at least one"):
        FORM.batch([], 0)
