"""Keep a frozen encoder's features: each image is encoded once, whatever the number of epochs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastmllm.models.weights.folder import renamed


def encoder_fingerprint(module: nn.Module, *extra: object) -> str:
    """Return a short hash over a module's weights and whatever else its output depends on."""
    digest = hashlib.sha256(repr(extra).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class FeatureCache:
    """Features of images by path, in memory and, given a folder, on disk.

    A file is named by the hash of the encoder's weights and the image size, and an entry by path and time of change, so
    a changed key never hits.

    Args:
        encoder: uint8 (I, H, W, 3) -> (I, N, Dv).
        image_size: side of the square that images are resized to, pixels.
        load: (path, size) -> uint8 (H, W, 3).
        folder: where to keep the features, or None.
    """

    def __init__(
        self, encoder: nn.Module, image_size: int, load: Callable[[str, int], Tensor], folder: Path | None = None
    ) -> None:
        self.encoder, self.image_size, self.load = encoder, image_size, load
        self.features: dict[str, Tensor] = {}
        self.path = folder / f"features-{encoder_fingerprint(encoder, image_size)}.safetensors" if folder else None
        self._stored = self._read()

    def _read(self) -> dict[str, Tensor]:
        if self.path is None or not self.path.is_file():
            return {}
        try:
            return load_file(self.path)
        except (OSError, ValueError, SafetensorError):  # a damaged cache is rebuilt
            self.path.unlink(missing_ok=True)
            return {}

    @staticmethod
    def _key(path: str) -> str:
        return f"{path}@{os.stat(path).st_mtime_ns}"

    @torch.no_grad()
    def add(
        self, paths: Iterable[str], batch_size: int = 16, progress: Callable[[int, int], None] | None = None
    ) -> FeatureCache:
        """Encode what is not there yet and store it; `progress(done, total)` is called after each batch."""
        wanted = [p for p in dict.fromkeys(paths) if p not in self.features]
        for p in wanted:
            if (hit := self._stored.get(self._key(p))) is not None:
                self.features[p] = hit
        missing = [p for p in wanted if p not in self.features]
        device = next(self.encoder.parameters()).device
        for start in range(0, len(missing), batch_size):
            chunk = missing[start : start + batch_size]
            pixels = torch.stack([self.load(p, self.image_size) for p in chunk])
            for p, feature in zip(chunk, self.encoder(pixels.to(device)).cpu(), strict=True):
                self.features[p] = feature.clone()
            if progress:
                progress(start + len(chunk), len(missing))
        if missing and self.path is not None:
            self._write()
        return self

    def _write(self) -> None:
        assert self.path is not None
        entries = {self._key(p): f for p, f in self.features.items()}
        try:
            with renamed(self.path) as temporary:
                save_file({**self._stored, **entries}, temporary)
        except (OSError, SafetensorError) as error:  # a cache that cannot be written costs time, not the run
            print(f"feature cache {self.path}: not written ({error}); features stay in memory for this run")
        self._stored.update(entries)

    def gather(self, paths: Sequence[str]) -> Tensor:
        """Return the features of images in order, (I, N, Dv).

        Raises:
            KeyError: an image was never added.
        """
        missing = [p for p in paths if p not in self.features]
        if missing:
            raise KeyError(f"feature cache: {len(missing)} images were never added, first {missing[0]}: call add()")
        return torch.stack([self.features[p] for p in paths])
