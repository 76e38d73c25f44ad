"""How the tokens of a mixture are shared out among its sources: as they are learned from, and as weights should ask."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from pathlib import Path

import torch

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Share:
    """What came from a source.

    Args:
        samples: sequences.
        tokens: positions, those of images too.
        targets: positions with a label.
    """

    samples: int = 0
    tokens: int = 0
    targets: int = 0

    def __add__(self, other: Share) -> Share:
        return Share(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class TokenShares:
    """Write down what each micro-batch took from each source, a line each; one that is done again replaces its line.

    Args:
        folder: of the stage; rank r > 0 writes `shares-r.jsonl`.
        rank: of this process.
        sources: names, which sample ids begin with.
    """

    def __init__(self, folder: Path, rank: int, sources: Sequence[str]) -> None:
        self.path = folder / ("shares.jsonl" if rank == 0 else f"shares-{rank}.jsonl")
        self._names = sorted(sources, key=len, reverse=True)  # "a/b" before "a"

    def note(
        self, index: int, ids: Sequence[str], cu_seqlens: torch.Tensor, labels: torch.Tensor | None = None
    ) -> None:
        """Note micro-batch `index`.

        Args:
            index: its number.
            ids: S sample ids.
            cu_seqlens: (S + 1,) boundaries; what stands behind them, such as padding, is nobody's.
            labels: (T,); None where nothing is labelled.
        """
        taken: dict[str, Share] = {}
        for name, (start, end) in zip(ids, pairwise(cu_seqlens.tolist()), strict=False):
            source = next((known for known in self._names if name.startswith(f"{known}/")), "?")
            targets = 0 if labels is None else int((labels[start:end] != IGNORE).sum())
            taken[source] = taken.get(source, Share()) + Share(1, end - start, targets)
        line = {"micro_batch": index, "sources": {source: astuple(share) for source, share in taken.items()}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_shares(folder: Path) -> dict[str, Share]:
    """Add up what all ranks of a stage took from each source; of a micro-batch that was done again the last counts.

    Raises:
        ValueError: no such log in the folder.
    """
    last: dict[int, dict[str, list[int]]] = {}
    files = sorted(folder.glob("shares*.jsonl"))
    if not files:
        raise ValueError(f"{folder}: no shares.jsonl; name the folder of a stage that learned from sources")
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the line that a killed process was writing; its micro-batch is done again
            last[row["micro_batch"]] = row["sources"]
    total: dict[str, Share] = {}
    for sources in last.values():
        for name, counts in sources.items():
            total[name] = total.get(name, Share()) + Share(*counts)
    return total


def sample_weights(token_shares: Mapping[str, float], tokens_a_sample: Mapping[str, float]) -> dict[str, float]:
    """Return the weights, which count samples, that give each source its share of the tokens in expectation.

    Args:
        token_shares: source -> share wanted, in any unit.
        tokens_a_sample: source -> mean tokens of its samples, such as `read_shares` of a short run tells.

    Returns:
        Source -> weight; they add up to 1.

    Raises:
        ValueError: a source without a mean, or numbers that are not above 0.
    """
    missing = sorted(set(token_shares) - set(tokens_a_sample))
    bad = [name for name, share in token_shares.items() if not (share > 0 and tokens_a_sample.get(name, 1) > 0)]
    if missing or bad or not token_shares:
        raise ValueError(f"token shares: {missing or bad or 'none given'}: each needs a share and a mean above 0")
    raw = {name: share / tokens_a_sample[name] for name, share in token_shares.items()}
    return {name: weight / sum(raw.values()) for name, weight in raw.items()}
