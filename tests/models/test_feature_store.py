"""Features on disk: keys, checksums, the cap, and several writers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tiny_shards import png, write_tar
from torch import nn

from fastmllm.data.byte_range import ByteRange
from fastmllm.models.feature_store import FeatureStore, image_key


class Tower(nn.Module):
    def __init__(self, scale: float = 1.0, dtype: torch.dtype = torch.float32, layer: int = -1) -> None:
        super().__init__()
        self.scale, self.config = nn.Parameter(torch.tensor([scale], dtype=dtype)), {"layer": layer}


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    names = [tmp_path / f"{number}.png" for number in range(8)]
    for number, name in enumerate(names):
        name.write_bytes(png(number))
    return [str(name) for name in names]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_computed_comes_back_to_the_bit(tmp_path: Path, images: list[str], dtype: torch.dtype) -> None:
    features = torch.randn(4, 3).to(dtype)
    FeatureStore(tmp_path, Tower(), 8).put(images[0], features)
    found = FeatureStore(tmp_path, Tower(), 8).lookup(images[:2])
    assert list(found) == images[:1]
    assert found[images[0]].dtype == dtype
    assert torch.equal(found[images[0]], features)


def test_a_changed_key_never_hits(tmp_path: Path, images: list[str]) -> None:
    FeatureStore(tmp_path, Tower(), 8).put(images[0], torch.ones(1, 1))
    others = [(Tower(2.0), 8), (Tower(), 16), (Tower(layer=-2), 8), (Tower(dtype=torch.bfloat16), 8)]
    assert all(FeatureStore(tmp_path, *other).get(images[0]) is None for other in others)
    store = FeatureStore(tmp_path, Tower(), 8)
    assert store.get(images[0]) is not None
    Path(images[0]).write_bytes(png(100))
    assert store.get(images[0]) is None


def test_the_bytes_count_not_where_they_lie(tmp_path: Path, images: list[str]) -> None:
    tar = write_tar(tmp_path / "a.tar", [("x.png", png(0))])
    inside = str(ByteRange(str(tar), tar.read_bytes().index(png(0)), len(png(0))))
    assert image_key(inside) == image_key(images[0]) != image_key(images[1])


@pytest.mark.parametrize("damage", ["bit", "cut", "empty"])
def test_a_damaged_entry_is_counted_and_leaves(tmp_path: Path, images: list[str], damage: str, capsys) -> None:
    store = FeatureStore(tmp_path, Tower(), 8)
    store.put(images[0], torch.ones(2, 2))
    (file,) = store.folder.rglob("*.features")
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes({"bit": bytes(data), "cut": bytes(data[:-5]), "empty": b""}[damage])
    assert store.get(images[0]) is None
    assert store.damaged == 1
    assert "is damaged" in capsys.readouterr().err
    assert not file.exists()
    store.put(images[0], torch.ones(2, 2))
    assert store.get(images[0]) is not None


def test_at_the_cap_what_is_there_stays(tmp_path: Path, images: list[str]) -> None:
    probe = FeatureStore(tmp_path / "probe", Tower(), 8)
    probe.put(images[0], torch.ones(4, 4))
    each = next(probe.folder.rglob("*.features")).stat().st_size
    store = FeatureStore(tmp_path, Tower(), 8, max_bytes=3 * each + each // 2)
    for image in [*images, *images]:
        store.put(image, torch.ones(4, 4))
    assert list(store.lookup(images)) == images[:3]
    assert store.refused == 10


def test_processes_write_at_once_and_keep_the_cap(tmp_path: Path, images: list[str]) -> None:
    probe = FeatureStore(tmp_path / "probe", Tower(), 8)
    probe.put(images[0], torch.ones(64, 64))
    each = next(probe.folder.rglob("*.features")).stat().st_size
    writers = []
    for first in range(4):
        if not (process := os.fork()):
            store = FeatureStore(tmp_path, Tower(), 8, max_bytes=5 * each)
            for turn in range(8):
                number = (first + turn) % 8
                store.put(images[number], torch.full((64, 64), float(number)))
            os._exit(0)
        writers.append(process)
    assert [os.waitpid(process, 0)[1] for process in writers] == [0] * 4
    store = FeatureStore(tmp_path, Tower(), 8)
    found = store.lookup(images)
    assert len(found) == 5
    assert sum(file.stat().st_size for file in store.folder.rglob("*.features")) == 5 * each
    for number, image in enumerate(images):
        assert image not in found or (found[image] == number).all()
