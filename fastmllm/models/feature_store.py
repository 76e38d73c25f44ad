"""Features of images on disk: found by the image's bytes and all that they were computed with, checked when read."""

from __future__ import annotations

import fcntl
import hashlib
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import PIL
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

import fastmllm
from fastmllm.data.byte_range import ByteRange
from fastmllm.data.video import Frame
from fastmllm.models.weights.folder import renamed


def encoder_fingerprint(module: nn.Module, *extra: object) -> str:
    """Return a short hash over a module's weights and whatever else its output depends on."""
    digest = hashlib.sha256(repr(extra).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def image_key(path: str) -> str:
    """Return a hash of an image's bytes, wherever they lie; of a frame, of its video's and its number.

    Raises:
        OSError: they cannot be read.
    """
    frame = Frame.parse(path)
    name = path if frame is None else frame.video
    found = ByteRange.parse(name)
    digest = hashlib.sha256(Path(name).read_bytes() if found is None else found.read())
    if frame is not None:
        digest.update(f"frame {frame.number}".encode())
    return digest.hexdigest()


class FeatureStore:
    """A folder of features, a file an image, as computed: shape and dtype stay.

    Its name is a hash of the encoder's weights, configuration (the layer, the normalisation) and precision, of what is
    done to images before, and of the versions of what resizes and computes; a file's name is that of the image's bytes.
    So a changed key never hits. Processes may write at once: a file is whole or absent, and their sizes are counted
    under a lock. Where the cap is reached nothing more is kept, and what is there stays: an order that comes again, as
    epochs do, would make a cache that drops the oldest miss every time.

    Args:
        folder: of all encoders.
        encoder: frozen.
        before: what else its output depends on, with a `repr` that says all of it: the side of the square that images
            are resized to, in pixels, or a resolution policy.
        max_bytes: cap; 0 = none.

    Attributes:
        damaged: entries that failed their checksum, and were computed again.
        refused: entries that were not kept, at the cap or on a full disk.
    """

    def __init__(self, folder: Path, encoder: nn.Module, before: object, max_bytes: int = 0) -> None:
        config = getattr(encoder, "config", None)
        versions = PIL.__version__, fastmllm.__version__
        of = encoder_fingerprint(encoder, type(encoder).__name__, config, before, *versions)
        self.folder, self.max_bytes = folder / f"features-{of}", max_bytes
        self.damaged, self.refused = 0, 0

    def get(self, path: str) -> Tensor | None:
        """Return the features of an image, (N, Dv) on the CPU, or None; raises as `entry`."""
        found = self.entry(path)
        return None if found is None else found["features"]

    def put(self, path: str, features: Tensor) -> None:
        """Keep the features of an image, (N, Dv), where there is room."""
        self.keep(path, {"features": features})

    def entry(self, path: str) -> dict[str, Tensor] | None:
        """Return what was kept of an image, on the CPU, or None.

        Raises:
            OSError: the image cannot be read.
        """
        file = self._file(path)
        try:
            data = file.read_bytes()
        except OSError:
            return None
        try:
            if data[:8] == _checksum(data[8:]):
                return load(data[8:])
        except (SafetensorError, ValueError):
            pass
        self.damaged += 1
        print(f"feature cache: {file} is damaged; its image is encoded again", file=sys.stderr)
        with self._sizes() as add:
            if file.exists():
                file.unlink()
                add(-len(data))
        return None

    def keep(self, path: str, entry: Mapping[str, Tensor]) -> None:
        """Keep tensors of an image where there is room."""
        payload = save({name: tensor.detach().cpu().contiguous() for name, tensor in entry.items()})
        data = _checksum(payload) + payload
        try:
            file = self._file(path)
            with self._sizes() as add:
                if file.exists():
                    return
                if self.max_bytes and add(0) + len(data) > self.max_bytes:
                    self.refused += 1
                    return
                with renamed(file) as temporary:
                    temporary.write_bytes(data)
                add(len(data))
        except OSError as error:  # a cache that cannot be written costs time, not the run
            if not self.refused:
                print(f"feature cache {self.folder}: not written ({error}); images are encoded again", file=sys.stderr)
            self.refused += 1

    def lookup(self, paths: Sequence[str]) -> dict[str, Tensor]:
        """Return what is there of some images, by path."""
        found = ((path, self.get(path)) for path in dict.fromkeys(paths))
        return {path: features for path, features in found if features is not None}

    def _file(self, path: str) -> Path:
        key = image_key(path)
        return self.folder / key[:2] / f"{key[2:34]}.features"

    def _sizes(self) -> _Sizes:
        return _Sizes(self.folder)


class _Sizes:
    """The bytes of a folder's entries, in a file of it that is held alone."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "bytes"

    def __enter__(self) -> _Sizes:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "a+")  # closed, and so unlocked, on exit
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __call__(self, more: int) -> int:
        """Add to the count, and return it."""
        self._file.seek(0)
        text = self._file.read()
        total = (int(text) if text.isdecimal() else self._counted()) + more
        if more or not text:
            self._file.seek(0)
            self._file.truncate()
            self._file.write(str(max(total, 0)))
            self._file.flush()
        return total

    def _counted(self) -> int:
        return sum(file.stat().st_size for file in self._path.parent.glob("*/*.features"))


def _checksum(data: bytes) -> bytes:
    return f"{zlib.crc32(data):08x}".encode()
