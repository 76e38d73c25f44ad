"""N-gram overlap of captions: BLEU (Papineni et al., 2002) and ROUGE-L (Lin, 2004) as COCO's evaluation has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from fastmllm.eval.captions import tokenise

ORDER = 4
BETA = 1.2  # ROUGE-L weighs recall 1.44 times as much as precision


def bleu_counts(text: str, references: Sequence[str]) -> dict[str, float]:
    """Count what a caption adds to a corpus BLEU: matched and all n-grams, its length, the closest reference length."""
    words = tokenise(text)
    refs = [tokenise(r) for r in references]
    counts: dict[str, float] = {"length": float(len(words))}
    counts["reference length"] = float(min((abs(len(r) - len(words)), len(r)) for r in refs)[1])
    for n in range(1, ORDER + 1):
        mine = _grams(words, n)
        most: Counter[tuple[str, ...]] = Counter()
        for ref in refs:
            most |= _grams(ref, n)
        counts[f"matched {n}"] = float(sum(min(c, most[g]) for g, c in mine.items()))
        counts[f"all {n}"] = float(sum(mine.values()))
    return counts


def bleu_of(sums: Mapping[str, float], order: int = ORDER) -> float:
    """Return corpus BLEU-`order`, 0 to 1, of summed `bleu_counts`; unsmoothed, so 0 where one order has no match."""
    precisions = [(sums.get(f"matched {n}", 0.0), sums.get(f"all {n}", 0.0)) for n in range(1, order + 1)]
    if not all(matched for matched, _ in precisions):
        return 0.0
    length, reference = sums["length"], sums["reference length"]
    brevity = 1.0 if length >= reference else float(np.exp(1 - reference / length))
    return brevity * float(np.exp(np.mean([np.log(matched / every) for matched, every in precisions])))


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]], order: int = ORDER) -> float:
    """Return corpus BLEU-`order`, 0 to 1.

    Equal to pycocoevalcap's `Bleu` (closest reference length) up to its 1e-9, and to sacreBLEU without smoothing on the
    same words.

    Raises:
        ValueError: lengths differ or an image has no reference.
    """
    if len(candidates) != len(references) or not all(references):
        raise ValueError(f"bleu: {len(candidates)} captions, {len(references)} reference sets; each needs one or more")
    sums: Counter[str] = Counter()
    for text, refs in zip(candidates, references, strict=True):
        sums.update(bleu_counts(text, refs))  # type: ignore[arg-type]  # counts of floats
    return bleu_of(sums, order)


def rouge_l(text: str, references: Sequence[str]) -> float:
    """Return ROUGE-L, 0 to 1: the longest common subsequence, best precision and best recall over the references.

    Equal to pycocoevalcap's `Rouge` (beta 1.2); with one reference and beta 1 it would be rouge-score's.
    """
    words = tokenise(text)
    if not words:
        return 0.0
    pairs = [(_common(words, ref), len(ref)) for ref in map(tokenise, references) if ref]
    precision = max((common / len(words) for common, _ in pairs), default=0.0)
    recall = max((common / length for common, length in pairs), default=0.0)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence; memory of one row."""
    row = [0] * (len(b) + 1)
    for word in a:
        left = 0  # the row above, one place to the left
        for j, other in enumerate(b, 1):
            left, row[j] = row[j], left + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]
