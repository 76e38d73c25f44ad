from __future__ import annotations

import importlib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastmllm.data.packing import IGNORE, collate, pack, pack_reference, sequence_length
from fastmllm.data.sample import Sample
from fastmllm.data.text import TextError, tokenise

IMAGE = 299


def make(name: str, image: Path | None, answer: str = "red apple") -> Sample:
    path = None if image is None else str(image)
    return Sample(id=name, prompt="What is this?", answer=answer, task="name", image=path)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = []
    for i in range(2):
        paths.append(tmp_path / f"{i}.png")
        Image.new("RGB", (5, 4), (i * 100, 7, 9)).save(paths[-1])
    return paths


def test_a_batch_spells_its_samples(tokenizer, pictures: list[Path]) -> None:
    samples = [make("a", pictures[0]), make("text", None, "cat"), make("b", pictures[1], "dog")]
    batch = collate(samples, tokenizer, num_visual_tokens=4, image_size=8, image_token_id=IMAGE)
    bounds = batch.cu_seqlens.tolist()
    assert batch.cu_seqlens.dtype == torch.int32
    assert bounds[-1] == len(batch.input_ids) == len(batch.labels) == len(batch.position_ids)
    assert batch.max_seqlen == max(b - a for a, b in pairwise(bounds))
    assert batch.ids == ["a", "text", "b"]
    assert batch.image_paths == [str(path) for path in pictures]
    scored = 0
    for s, sample in enumerate(samples):
        tokens = tokenise(sample, tokenizer)
        ids = batch.input_ids[bounds[s] : bounds[s + 1]].tolist()
        labels = batch.labels[bounds[s] : bounds[s + 1]].tolist()
        image = [IMAGE] * 4 if sample.image else []
        assert ids == tokens.prefix + image + tokens.prompt + tokens.answer
        assert len(ids) == sequence_length(tokens, len(image))
        assert batch.position_ids[bounds[s] : bounds[s + 1]].tolist() == list(range(len(ids)))
        # labels[t] is the token at t + 1, and only answer and end token are scored.
        start = len(ids) - len(tokens.answer) - 1
        assert labels == [IGNORE] * start + tokens.answer + [IGNORE]
        assert all(label == after for label, after in zip(labels[start:-1], ids[start + 1 :], strict=True))
        scored += len(tokens.answer)
    assert batch.num_targets == scored == int((batch.labels != IGNORE).sum())
    assert (batch.input_ids[batch.image_index] == IMAGE).all()
    assert len(set(batch.image_index.tolist())) == len(batch.image_index) == int((batch.input_ids == IMAGE).sum()) == 8
    assert batch.pixels is not None
    assert (batch.pixels.shape, batch.pixels.dtype) == ((2, 8, 8, 3), torch.uint8)
    assert batch.pixels[1, 0, 0].tolist() == [100, 7, 9]


def test_text_alone_cached_features_and_prompts_alone(tokenizer, pictures: list[Path]) -> None:
    text = collate([make("t", None)], tokenizer, num_visual_tokens=4, image_size=8, image_token_id=IMAGE)
    assert text.pixels is None
    assert text.image_index.shape == (0,)
    assert text.image_index.dtype == torch.int64
    absent = make("a", pictures[0].with_name("absent.png"))
    cached = collate([absent], tokenizer, num_visual_tokens=4, image_size=8, image_token_id=IMAGE, load_pixels=False)
    assert cached.pixels is None
    assert cached.image_paths == [absent.image]
    prompt = collate(
        [make("a", pictures[0])],
        tokenizer,
        num_visual_tokens=4,
        image_size=8,
        image_token_id=IMAGE,
        with_answers=False,
    )
    tokens = tokenise(make("a", None), tokenizer)
    assert prompt.input_ids.tolist() == tokens.prefix + [IMAGE] * 4 + tokens.prompt
    assert prompt.num_targets == 0
    assert (prompt.labels == IGNORE).all()


def test_bad_batches(tokenizer, pictures: list[Path]) -> None:
    more = {"num_visual_tokens": 4, "image_size": 8, "image_token_id": IMAGE}
    with pytest.raises(ValueError, match="no samples"):
        collate([], tokenizer, **more)
    with pytest.raises(TextError, match="'a': empty answer"):
        collate([make("a", pictures[0], "")], tokenizer, **more)
    with pytest.raises(ValueError, match=r"absent\.png: no such image"):
        collate([make("a", pictures[0].with_name("absent.png"))], tokenizer, **more)
    with pytest.raises(ValueError, match="num_visual_tokens must be at least 1"):
        collate([make("a", None)], tokenizer, **(more | {"num_visual_tokens": 0}))


LENGTHS = st.lists(st.integers(1, 50), max_size=60)


@given(lengths=LENGTHS, slack=st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_packing_keeps_every_item_and_the_budget(lengths: list[int], slack: int) -> None:
    capacity = max(lengths, default=1) + slack
    bins = pack(lengths, capacity)
    assert sorted(i for bin_ in bins for i in bin_) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in bin_) for bin_ in bins]
    assert all(load <= capacity for load in loads)
    assert sum(2 * load <= capacity for load in loads) <= 1  # first fit leaves at most one bin half empty


def test_packing_in_words() -> None:
    assert pack([3, 5, 4, 3, 1], 8) == [[0, 1], [2, 3, 4]]
    assert pack_reference([3, 5, 4, 3, 1], 8) == [[0, 1], [2, 3, 4]]
    assert pack([], 8) == []
    for bad in ([9], [1, 0]):
        with pytest.raises(ValueError, match=rf"item {len(bad) - 1} has {bad[-1]} tokens, a bin holds 1 to 8"):
            pack(bad, 8)


@given(lengths=LENGTHS, slack=st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_native_and_python_packing_agree(lengths: list[int], slack: int) -> None:
    try:
        planner = importlib.import_module("fastmllm._planner")
    except ImportError:
        pytest.skip("the native planner is not built")
    capacity = max(lengths, default=1) + slack
    assert [list(b) for b in planner.pack_first_fit(lengths, capacity)] == pack_reference(lengths, capacity)


def test_an_image_that_several_samples_show_is_held_once(tokenizer, pictures: list[Path]) -> None:
    samples = [make("a", pictures[0]), make("b", pictures[1]), make("text", None), make("c", pictures[0], "dog")]
    batch = collate(samples, tokenizer, num_visual_tokens=2, image_size=8, image_token_id=IMAGE)
    assert batch.image_paths == [str(path) for path in pictures]
    assert batch.pixels is not None
    assert len(batch.pixels) == 2
    assert batch.shown is not None
    assert batch.shown.tolist() == [0, 1, 0]
    assert len(batch.image_index) == 6
    assert collate(samples[:3], tokenizer, num_visual_tokens=2, image_size=8, image_token_id=IMAGE).shown is None
