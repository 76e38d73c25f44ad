"""Reading an image file into pixels, or saying in one line why that is not possible."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from fastmllm.data.byte_range import openable
from fastmllm.data.cache import atomic_path
from fastmllm.data.video import Frame

MAX_PIXELS = 64 * 1024 * 1024  # 64 MP: above any camera here, and 192 MiB once decoded


class ImageError(ValueError):
    """An image file that cannot be used; the message names the file and the remedy."""


def open_image(path: str | Path, *, alpha: bool = False) -> Image.Image:
    """Decode an image file with the camera's orientation applied.

    Args:
        path: PNG, JPEG or any other format that Pillow reads, the first frame of an animation; or `str` of a
            `ByteRange` that holds one, or of a video's `Frame`.
        alpha: keep transparency instead of laying it over white.

    Returns:
        An RGB image, or RGBA with `alpha`.

    Raises:
        ImageError: missing, not an image, truncated, 0 pixels, or more than `MAX_PIXELS` pixels.
    """
    with _refusing(path), _opened(path) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ImageError(
                f"{path}: {width} x {height} pixels, more than {MAX_PIXELS} "
                "(decompression bomb?); remove the file or shrink it first"
            )
        image.load()
        upright = ImageOps.exif_transpose(image)
        return upright.convert("RGBA") if alpha else over_white(upright)


def upright_size(path: str | Path) -> tuple[int, int]:
    """Return (width, height) of what `open_image` makes of a file, from its header.

    Raises:
        ImageError: as `open_image`, as far as the header tells.
    """
    with _refusing(path), _opened(path) as image:
        turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) > 4  # not PNG's own: it decodes all
        width, height = image.size
        return (height, width) if turned and image.format != "TIFF" else (width, height)  # a TIFF's is upright


@contextmanager
def _refusing(path: str | Path) -> Iterator[None]:
    """Say of an image that cannot be used why not, and what to do."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such image; check the path, or rebuild the data set") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: decompression bomb ({error}); remove the file or shrink it first") from error
    except UnidentifiedImageError as error:
        # Pillow identifies no file of 0 x n pixels.
        raise ImageError(
            f"{path}: not an image, without pixels (0 x n), or damaged in its header; replace or remove the file"
        ) from error
    except IsADirectoryError as error:
        raise ImageError(f"{path}: a folder, not an image; give a file") from error
    except PermissionError as error:
        raise ImageError(f"{path}: not readable; change its permissions") from error
    except (OSError, SyntaxError, ValueError, EOFError, OverflowError, MemoryError) as error:
        # Pillow's decoders raise any of these on damaged data.
        raise ImageError(f"{path}: truncated or damaged ({error}); replace or remove the file") from error


def _opened(path: str | Path) -> Image.Image:
    frame = Frame.parse(path)
    return Image.open(openable(path)) if frame is None else frame.decode()


def over_white(image: Image.Image) -> Image.Image:
    """Return an RGB copy with transparency laid over white."""
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion clips 16-bit values at 255 instead of scaling them.
        values = np.asarray(image).astype(np.float64)
        top = 65535.0 if values.max(initial=0.0) > 255.0 else 255.0
        return Image.fromarray(np.clip(values / top * 255.0, 0.0, 255.0).round().astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB")


def load_image(path: str | Path, size: int | None = None) -> torch.Tensor:
    """Load an image as pixels.

    Args:
        path: image file.
        size: side in pixels to resize to (bicubic, antialiased; the aspect ratio is not kept); None = as it is.

    Returns:
        (H, W, 3) uint8, channels last.

    Raises:
        ImageError: as `open_image`.
        ValueError: size < 1.
    """
    if size is not None and size < 1:
        raise ValueError(f"load_image: size must be at least 1 pixel, got {size}")
    image = open_image(path)
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)  # Pillow widens the filter when it shrinks
    return torch.from_numpy(np.array(image))  # (H, W, 3)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG under a temporary name and rename it."""
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", compress_level=3)
