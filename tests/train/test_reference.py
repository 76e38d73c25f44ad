from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastmllm.data.sample import Sample
from fastmllm.train.reference import ReferenceCache


def make(name: str, image: Path | None = None, answer: str = "red") -> Sample:
    return Sample(id=name, prompt="?", answer=answer, task="name", image=None if image is None else str(image))


class Model:
    """Remember what was asked; the value depends on the chunk, so that a chunk cut short would show."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        self.asked += [sample.id for sample in samples]
        return torch.tensor([-float(len(sample.answer)) - 0.1 * len(samples) for sample in samples])


def test_values_are_kept_to_the_bit_and_never_computed_twice(tmp_path: Path) -> None:
    samples, model = [make("a"), make("b", answer="blue"), make("c", answer="green")], Model()
    cache = ReferenceCache(tmp_path, "w", {"keep": 4})
    assert cache.add([samples[:2], samples[2:]], model) == 3
    again = ReferenceCache(tmp_path, "w", {"keep": 4})
    assert again.add([samples[:2], samples[2:]], model) == 0
    assert model.asked == ["a", "b", "c"]
    expected = Model()
    values = [*expected(samples[:2]).tolist(), *expected(samples[2:]).tolist()]
    assert [again[s] for s in samples] == [cache[s] for s in samples] == values
    # the name of a sample is not what it says
    assert again[make("another name")] == values[0]
    # a chunk is computed whole, whatever of it is there
    assert again.add([[samples[0], make("d", answer="white")]], model) == 2
    assert len(again) == 4


def test_a_changed_key_never_hits(tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    picture.write_bytes(b"one")
    cache = ReferenceCache(tmp_path, "w", {"keep": 4})
    cache.add([[make("a", picture)]], Model())
    assert cache[make("a", picture)] == pytest.approx(-3.1)
    for other in (make("a", picture, "rad"), make("a")):
        with pytest.raises(KeyError, match="'a' was never added"):
            cache[other]
    for other in (ReferenceCache(tmp_path, "v", {"keep": 4}), ReferenceCache(tmp_path, "w", {"keep": 9})):
        assert len(other) == 0
    picture.write_bytes(b"two")
    with pytest.raises(KeyError, match="never added"):
        cache[make("a", picture)]
    moved = tmp_path / "moved.png"
    moved.write_bytes(b"one")
    assert ReferenceCache(tmp_path, "w", {"keep": 4})[make("a", moved)] == pytest.approx(-3.1)


def test_what_is_damaged_is_said_and_computed_again(tmp_path: Path) -> None:
    model = Model()
    cache = ReferenceCache(tmp_path, "w", {})
    cache.add([[make("a")]], model)
    tensors = load_file(cache.path)
    whole = cache.path.read_bytes()
    tensors["values"] += 1
    save_file(tensors, cache.path, metadata={"checksum": "of the old ones"})
    for damaged in (cache.path.read_bytes(), whole[:30]):
        cache.path.write_bytes(damaged)
        found = ReferenceCache(tmp_path, "w", {})
        assert found.damaged is not None
        assert str(cache.path) in found.damaged
        assert found.add([[make("a")]], model) == 1
        assert found[make("a")] == cache[make("a")]
        assert cache.path.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == [cache.path.name]


def test_ranks_share_the_work(tmp_path: Path) -> None:
    chunks = [[make("a", answer="1")], [make("b", answer="12")], [make("c", answer="123")]]
    parts: list[dict[bytes, float]] = []
    models = [Model(), Model()]
    for rank in (0, 1):
        cache = ReferenceCache(tmp_path, "w", {})
        cache.add(chunks, models[rank], rank=rank, ranks=2, gather=lambda part: parts.append(part) or [part])
        cache.path.unlink(missing_ok=True)
    assert [model.asked for model in models] == [["a", "c"], ["b"]]
    both = ReferenceCache(tmp_path, "w", {})
    both.add(chunks, Model(), rank=1, ranks=2, gather=lambda part: parts)
    assert both[chunks[0][0]] == pytest.approx(-1.1)
    assert not both.path.exists()  # rank 0 writes


def test_a_value_that_is_not_finite_names_its_sample(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="log-probability of a is not finite"):
        ReferenceCache(tmp_path, "w", {}).add([[make("a")]], lambda samples: torch.tensor([float("nan")]))
