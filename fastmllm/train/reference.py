"""Log-probabilities under the model that a stage starts from, computed once and kept on disk.

DPO's reference is the model before the first step. Its log-probabilities never change, so they are computed before
training, with the encoder (and its feature cache) that the policy uses, instead of running a second model beside it in
every step. A file belongs to one set of weights and one way to make a batch, an entry to one question, answer and image
content: what changed is never found.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastmllm.data.sample import Sample
from fastmllm.train.checkpoint import atomic_file, fingerprint


class ReferenceCache:
    """Log-probability of each sample's answer under fixed weights.

    Args:
        folder: where the file goes.
        weights: fingerprint of all weights (`checkpoint.model_fingerprint`).
        identity: JSON-able, all else that a log-probability depends on: image size, visual tokens, template, tokenizer.
    """

    def __init__(self, folder: Path, weights: str, identity: Any) -> None:
        self.of = fingerprint([weights, identity])
        self.path = folder / f"reference-{self.of}.safetensors"
        self.damaged: str | None = None  # what was wrong with the file that was there
        self._images: dict[str, tuple[int, int, str]] = {}  # path -> size, time of change, hash of its content
        self._values: dict[bytes, float] = self._read()

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, sample: Sample) -> float:
        """Return the log-probability of a sample that was added.

        Raises:
            KeyError: it was not, or its text or image has changed since.
        """
        try:
            return self._values[self._key(sample)]
        except KeyError:
            raise KeyError(f"reference: {sample.id!r} was never added; call add() before training") from None

    def add(
        self,
        chunks: Sequence[Sequence[Sample]],
        log_probs: Callable[[Sequence[Sample]], Tensor],
        *,
        rank: int = 0,
        ranks: int = 1,
        gather: Callable[[Any], list[Any]] = lambda value: [value],
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Compute what is not there yet and store it.

        Chunks are computed whole, whatever of them is missing, so that a value does not depend on what was cached.

        Args:
            chunks: samples that are computed together.
            log_probs: samples -> (S,) log-probabilities of their answers.
            rank, ranks: this process computes every `ranks`-th missing chunk.
            gather: gives every rank the list of every rank's value.
            progress: called with chunks done and to do.

        Returns:
            samples computed, over all ranks.

        Raises:
            ValueError: a value that is not finite.
            CheckpointError: the file cannot be written.
        """
        missing = [chunk for chunk in chunks if any(self._key(sample) not in self._values for sample in chunk)]
        mine, found = missing[rank::ranks], {}
        for done, chunk in enumerate(mine, start=1):
            with torch.no_grad():
                values = log_probs(chunk).double().tolist()
            if bad := [s.id for s, value in zip(chunk, values, strict=True) if not math.isfinite(value)]:
                raise ValueError(
                    f"reference: the log-probability of {', '.join(bad[:8])} is not finite: the model that the stage "
                    "starts from is broken, or these samples are"
                )
            found.update({self._key(sample): value for sample, value in zip(chunk, values, strict=True)})
            if progress is not None:
                progress(done, len(mine))
        for part in gather(found):
            self._values.update(part)
        if missing and rank == 0:
            self._write()
        return sum(map(len, missing))

    def _key(self, sample: Sample) -> bytes:
        """Return 32 bytes of the question, the answer, and the content of the image."""
        image = None if sample.image is None else self._content(sample.image)
        return hashlib.sha256(json.dumps([sample.prompt, sample.answer, image]).encode()).digest()

    def _content(self, path: str) -> str:
        stat = os.stat(path)
        known = self._images.get(path)
        if known is None or known[:2] != (stat.st_size, stat.st_mtime_ns):
            known = (stat.st_size, stat.st_mtime_ns, hashlib.sha256(Path(path).read_bytes()).hexdigest())
            self._images[path] = known
        return known[2]

    def _read(self) -> dict[bytes, float]:
        if not self.path.is_file():
            return {}
        try:
            with safe_open(str(self.path), framework="pt") as file:
                keys, values, checksum = file.get_tensor("keys"), file.get_tensor("values"), file.metadata()["checksum"]
            if _checksum(keys, values) != checksum:
                raise ValueError("its checksum is another one")
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            self.damaged = f"{self.path} is damaged ({str(error).splitlines()[0]}); its values are computed again"
            return {}
        return {bytes(key): value for key, value in zip(keys.numpy(), values.tolist(), strict=True)}

    def _write(self) -> None:
        keys = torch.tensor([list(key) for key in self._values], dtype=torch.uint8)  # (N, 32)
        values = torch.tensor(list(self._values.values()), dtype=torch.float64)
        with atomic_file(self.path) as temporary:
            save_file({"keys": keys, "values": values}, temporary, metadata={"checksum": _checksum(keys, values)})


def _checksum(keys: Tensor, values: Tensor) -> str:
    return hashlib.sha256(keys.numpy().tobytes() + values.numpy().tobytes()).hexdigest()
