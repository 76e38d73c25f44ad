"""Kept features: encoded once, found again by weights, size and file; a changed key never hits."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny_vlm import colour_photos
from torch import nn

from fastmllm.data.images import load_image
from fastmllm.models.feature_store import encoder_fingerprint
from fastmllm.models.features import FeatureCache


class Counting(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.images = 0

    def forward(self, pixels):
        self.images += len(pixels)
        return self.scale * pixels.float().mean((1, 2))[:, None]


@pytest.fixture
def paths(tmp_path):
    folder = colour_photos(tmp_path / "photos", count=1)
    return [str(p) for p in sorted(folder.rglob("*.png"))][:3]


def test_an_image_is_encoded_once(paths, tmp_path):
    encoder = Counting()
    cache = FeatureCache(encoder, 8, load_image, tmp_path).add([*paths, *paths], batch_size=2)
    assert encoder.images == 3
    again = FeatureCache(encoder, 8, load_image, tmp_path).add(paths)
    assert encoder.images == 3
    torch.testing.assert_close(again.gather(paths), cache.gather(paths))
    assert cache.gather(paths[::-1]).shape == (3, 1, 3)


def test_a_changed_key_never_hits(paths, tmp_path):
    FeatureCache(Counting(), 8, load_image, tmp_path).add(paths)
    other = Counting(2.0)
    FeatureCache(other, 8, load_image, tmp_path).add(paths)
    assert other.images == 3  # other weights
    size = Counting()
    FeatureCache(size, 16, load_image, tmp_path).add(paths)
    assert size.images == 3  # other resolution
    Image.new("RGB", (9, 9)).save(paths[0])
    changed = Counting()
    FeatureCache(changed, 8, load_image, tmp_path).add(paths)
    assert changed.images == 1  # another image under the same name
    assert encoder_fingerprint(Counting()) != encoder_fingerprint(Counting(2.0))


def test_a_damaged_file_is_rebuilt(paths, tmp_path):
    cache = FeatureCache(Counting(), 8, load_image, tmp_path).add(paths)
    next(cache.store.folder.rglob("*.features")).write_bytes(b"not safetensors")
    encoder = Counting()
    again = FeatureCache(encoder, 8, load_image, tmp_path).add(paths)
    assert (encoder.images, again.store.damaged) == (1, 1)
    assert torch.equal(again.gather(paths), cache.gather(paths))


def test_a_full_disk_costs_time_not_the_run(paths, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    cache = FeatureCache(Counting(), 8, load_image, tmp_path).add(paths)
    assert capsys.readouterr().err.count("not written") == 1
    assert cache.gather(paths).shape == (3, 1, 3)
    assert not list(tmp_path.rglob("*.features*"))


def test_an_unknown_image_is_named(paths):
    with pytest.raises(KeyError, match="2 images were never added"):
        FeatureCache(Counting(), 8, load_image).gather(paths[:2])
