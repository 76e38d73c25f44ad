"""Frames of a video under names of their own, so that they are read as images are; and how many of them are shown.

Animations (GIF, WebP, APNG) are read by Pillow, other files by PyAV (`pip install av`), where one is met.
"""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from fastmllm.data.byte_range import openable

SUFFIXES = frozenset({".mp4", ".m4v", ".webm", ".mkv", ".avi", ".mov"})
_NAME = re.compile(r"frame://(\d+)::(.+)", re.DOTALL)
_open = threading.local()  # the video that this thread reads: frames come in their order, and are decoded once


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame of a file.

    Args:
        video: path, or `str` of a `ByteRange`.
        number: from 0.
    """

    video: str
    number: int

    def __str__(self) -> str:
        return f"frame://{self.number}::{self.video}"

    @classmethod
    def parse(cls, name: str | Path) -> Frame | None:
        """Return the frame that `str` of it names; None for anything else."""
        found = _NAME.fullmatch(name) if isinstance(name, str) else None
        return None if found is None else cls(found[2], int(found[1]))

    def decode(self) -> Image.Image:
        """Read the frame.

        Raises:
            OSError: no such file or frame, or it is damaged.
            ImportError: PyAV is needed and missing.
        """
        try:
            with Image.open(openable(self.video)) as animation:
                try:
                    animation.seek(self.number)
                except EOFError as error:
                    raise OSError(f"no frame {self.number}") from error
                return animation.copy()
        except UnidentifiedImageError:
            return self._film().read(self.number)

    def _film(self) -> _Film:
        film: _Film | None = getattr(_open, "film", None)
        if film is None or film.video != self.video or film.next > self.number:
            _open.film = film = _Film(self.video)
        return film


class _Film:
    """A video that is read forwards."""

    def __init__(self, video: str) -> None:
        self.video, self.next = video, 0
        self._frames: Iterator[Any] = _container(video).decode(video=0)

    def read(self, number: int) -> Image.Image:
        try:
            while True:
                frame, self.next = next(self._frames), self.next + 1
                if self.next > number:
                    image: Image.Image = frame.to_image()
                    return image
        except StopIteration as error:
            raise OSError(f"ends before frame {number}") from error
        except (ValueError, RuntimeError) as error:  # FFmpeg's errors are ValueErrors too
            raise OSError(str(error)) from error


def _container(video: str) -> Any:
    try:
        av = importlib.import_module("av")
    except ImportError as error:
        raise ImportError(
            f"{video}: a video that is no GIF or WebP needs PyAV: pip install av, or leave it out of the source"
        ) from error
    file = openable(video)
    try:
        return av.open(str(file) if isinstance(file, Path) else file)
    except OSError:
        raise
    except ValueError as error:
        raise OSError(str(error)) from error


def measure(video: str) -> tuple[int, tuple[int, int]]:
    """Return how many frames a video, an animation or an image has, and their (width, height) in pixels.

    Raises:
        OSError: no such file, or damaged.
        ImportError: PyAV is needed and missing.
    """
    try:
        with Image.open(openable(video)) as animation:
            return int(getattr(animation, "n_frames", 1)), animation.size
    except UnidentifiedImageError:
        pass
    with _container(video) as film:
        if not film.streams.video:
            raise OSError("no video stream")
        stream = film.streams.video[0]
        size = (stream.width, stream.height)
        # what a header says of the number is at times wrong: packets are counted, not decoded
        frames = sum(packet.pts is not None for packet in film.demux(stream))
    if not frames:
        raise OSError("no frames")
    return frames, size


def chosen(frames: int, most: int) -> list[int]:
    """Return the numbers of the frames that are shown: at most `most`, each from the middle of an equal share."""
    shown = min(frames, most)
    return [(2 * part + 1) * frames // (2 * shown) for part in range(shown)]
