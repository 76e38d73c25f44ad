"""In which order a source's samples come: a pure function of seed and draw, blocks of shards at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from fastmllm.data.augment import rng_of


class BlockShuffle:
    """Shuffle the shards, then the samples of some neighbouring shards among each other.

    Draw d is draw d mod N of epoch d div N: an epoch has every sample exactly once, and the next one follows without a
    gap, so that no remainder is left out or filled up, whatever the batch and the number of ranks.

    Args:
        sizes: samples of each shard.
        seed: of every order.
        name: of the source, so that two of them are shuffled apart.
        block_shards: shards whose samples are mixed, and whose files are open at a time.

    Raises:
        ValueError: no samples, or block_shards < 1.
    """

    def __init__(self, sizes: Sequence[int], *, seed: int, name: str, block_shards: int = 8) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.num_samples = int(self.sizes.sum())
        if self.num_samples < 1 or block_shards < 1:
            raise ValueError(f"order of {name!r}: {self.num_samples} samples, blocks of {block_shards}: need 1 of both")
        self.seed, self.name, self.block_shards = seed, name, block_shards
        # Per instance: a cache on the method would keep every order alive. Two epochs meet in a batch.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._block = lru_cache(maxsize=2)(self._make_block)

    def __reduce__(self) -> tuple[object, ...]:
        return _again, (self.sizes.tolist(), self.seed, self.name, self.block_shards)

    def __getitem__(self, draw: int) -> tuple[int, int]:
        """Return (shard, sample in it) of a draw, from 0."""
        epoch, position = divmod(draw, self.num_samples)
        _, ends = self._epoch(epoch)
        block = int(np.searchsorted(ends, position, side="right"))
        shards, starts, samples = self._block(epoch, block)
        sample = int(samples[position - (int(ends[block - 1]) if block else 0)])
        at = int(np.searchsorted(starts, sample, side="right")) - 1
        return int(shards[at]), sample - int(starts[at])

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        shards = rng_of("shards", self.seed, self.name, epoch).permutation(np.flatnonzero(self.sizes))
        sizes = self.sizes[shards]
        edges = np.arange(0, len(shards), self.block_shards)
        return shards, np.cumsum(np.add.reduceat(sizes, edges))  # last draw of each block + 1

    def _make_block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shards = self._epoch(epoch)[0][block * self.block_shards : (block + 1) * self.block_shards]
        starts = np.cumsum(self.sizes[shards]) - self.sizes[shards]
        count = int(self.sizes[shards].sum())
        return shards, starts, rng_of("samples", self.seed, self.name, epoch, block).permutation(count)


def _again(sizes: Sequence[int], seed: int, name: str, block_shards: int) -> BlockShuffle:
    return BlockShuffle(sizes, seed=seed, name=name, block_shards=block_shards)
