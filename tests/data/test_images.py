from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmllm.data import ImageError, load_image
from fastmllm.data.byte_range import ByteRange
from fastmllm.data.images import open_image, upright_size


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_pixels_come_back_exactly(tmp_path: Path) -> None:
    pixels = noise(5, 7)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", None)
    assert loaded.dtype == torch.uint8
    assert torch.equal(loaded, torch.from_numpy(pixels))  # (5, 7, 3)


def test_resize_is_square_and_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((64, 96, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # a resize without antialiasing would pick black or white
    Image.fromarray(stripes).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", 8)
    assert loaded.shape == (8, 8, 3)
    assert (loaded.float() - 127.5).abs().max() < 16


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, 1] = (255, 0, 0, 255)
    rgba[0, 2] = (0, 0, 0, 128)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    row = load_image(tmp_path / "a.png", None)[0].tolist()
    assert row[0] == [255, 255, 255]
    assert row[1] == [255, 0, 0]
    assert row[2] == [127, 127, 127]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 9, 9])
    palette.save(tmp_path / "b.png", transparency=0)
    assert load_image(tmp_path / "b.png", None).tolist() == [[[255, 255, 255]]]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", None)[0, :, 0].tolist() == [0, 128, 255]


def test_the_cameras_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg", None).shape == (4, 2, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"half.{suffix}"
    Image.fromarray(noise(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=rf"half\.{suffix}: truncated.*replace or remove"):
        load_image(path, 32)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such image; check the path"),
        (b"", "not an image.*replace or remove"),
        (b"hello", "not an image.*replace or remove"),
        (png_header(0, 5), r"0 x n.*replace or remove"),
        (b"P6\n0 5\n255\n", r"0 x n.*replace or remove"),
        (png_header(12_000, 12_000), "12000 x 12000 pixels.*bomb.*remove"),
        (png_header(100_000, 100_000), "bomb.*remove"),
    ],
)
def test_bad_files_end_in_one_message(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"bad\.png: .*{reason}"):
        load_image(path, 8)


def test_a_folder_and_a_bad_size_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="a folder, not an image"):
        load_image(tmp_path, 8)
    with pytest.raises(ValueError, match="at least 1 pixel"):
        load_image(tmp_path / "a.png", 0)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_header_tells_the_upright_size(tmp_path: Path, form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"a.{form.lower()}"
    Image.new("RGB", (12, 7)).save(file, format=form, exif=exif)
    assert upright_size(file) == open_image(file).size == ((7, 12) if orientation == 6 else (12, 7))
    inside = ByteRange(str(file), 0, file.stat().st_size)
    assert upright_size(str(inside)) == open_image(file).size
    with pytest.raises(ImageError, match="no such image"):
        upright_size(tmp_path / "gone.png")
    file.write_bytes(b"no image")
    with pytest.raises(ImageError, match="damaged in its header"):
        upright_size(file)
