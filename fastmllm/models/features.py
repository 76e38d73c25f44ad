"""Keep a frozen encoder's features: each image is encoded once, whatever the number of epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastmllm.models.feature_store import FeatureStore


class FeatureCache:
    """Features of images by path, in memory and, given a folder, in a `FeatureStore`.

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
        self.store = None if folder is None else FeatureStore(folder, encoder, image_size)

    @torch.no_grad()
    def add(
        self, paths: Iterable[str], batch_size: int = 16, progress: Callable[[int, int], None] | None = None
    ) -> FeatureCache:
        """Encode what is not there yet and store it; `progress(done, total)` is called after each batch."""
        wanted = [p for p in dict.fromkeys(paths) if p not in self.features]
        if self.store is not None:
            self.features |= self.store.lookup(wanted)
        missing = [p for p in wanted if p not in self.features]
        device = next(self.encoder.parameters()).device
        for start in range(0, len(missing), batch_size):
            chunk = missing[start : start + batch_size]
            pixels = torch.stack([self.load(p, self.image_size) for p in chunk])
            for p, feature in zip(chunk, self.encoder(pixels.to(device)).cpu(), strict=True):
                self.features[p] = feature.clone()
                if self.store is not None:
                    self.store.put(p, feature)
            if progress:
                progress(start + len(chunk), len(missing))
        return self

    def gather(self, paths: Sequence[str]) -> Tensor:
        """Return the features of images in order, (I, N, Dv).

        Raises:
            KeyError: an image was never added.
        """
        missing = [p for p in paths if p not in self.features]
        if missing:
            raise KeyError(f"feature cache: {len(missing)} images were never added, first {missing[0]}: call add()")
        return torch.stack([self.features[p] for p in paths])
