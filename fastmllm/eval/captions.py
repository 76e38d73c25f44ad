"""Caption scores: CIDEr-D (Vedantam et al., arXiv 1411.5726) and CHAIR (Rohrbach et al., arXiv 1809.02156)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastmllm.eval.parsing import normalise

SIGMA = 6.0
ORDER = 4


def tokenise(text: str) -> list[str]:
    """Split into lower-case words without punctuation; CJK characters stand alone."""
    return re.findall(r"[㐀-鿿぀-ヿ]|[^\W㐀-鿿぀-ヿ]+", text.casefold())


def _ngrams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDER + 1) for i in range(len(words) - n + 1))


class CiderD:
    """CIDEr-D against one corpus of references, the formula of pycocoevalcap; a caption is scored alone.

    The document frequencies are those of this corpus: scores of different sets do not compare, and one image alone
    scores 0.

    Args:
        references: at least one an image.

    Raises:
        ValueError: an image has no reference.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        if not all(references):
            raise ValueError("cider: an image without references; each needs one or more")
        self.frequency: Counter[tuple[str, ...]] = Counter()
        for refs in references:
            self.frequency.update({gram for ref in refs for gram in _ngrams(tokenise(ref))})
        self.log_count = np.log(float(len(references))) if references else 0.0

    def score(self, text: str, references: Sequence[str]) -> float:
        """Score a caption against its image's references; a perfect one of four words or more gets 10."""
        mine, norm, length = self._vector(text)
        total = np.zeros(ORDER)
        for ref in references:
            theirs, ref_norm, ref_length = self._vector(ref)
            penalty = np.exp(-((length - ref_length) ** 2) / (2 * SIGMA**2))
            for n in range(ORDER):
                dot = sum(min(v, theirs[n].get(g, 0.0)) * theirs[n].get(g, 0.0) for g, v in mine[n].items())
                if norm[n] and ref_norm[n]:
                    total[n] += dot / (norm[n] * ref_norm[n]) * penalty
        return float(10.0 * total.mean() / len(references))

    def _vector(self, text: str) -> tuple[list[dict], np.ndarray, int]:
        parts: list[dict] = [{} for _ in range(ORDER)]
        grams = _ngrams(tokenise(text))
        for gram, count in grams.items():
            parts[len(gram) - 1][gram] = count * (self.log_count - np.log(max(1.0, self.frequency[gram])))
        norms = np.array([np.sqrt(sum(v * v for v in part.values())) for part in parts])
        return parts, norms, sum(c for g, c in grams.items() if len(g) == 2)  # pycocoevalcap's length: bigrams


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Score each caption by CIDEr-D against the references of all of them.

    Args:
        candidates: one caption an image.
        references: at least one reference an image.

    Raises:
        ValueError: lengths differ or an image has no reference.
    """
    if len(candidates) != len(references):
        raise ValueError(f"cider: {len(candidates)} captions, {len(references)} reference sets; each needs one or more")
    corpus = CiderD(references)
    return [corpus.score(text, refs) for text, refs in zip(candidates, references, strict=True)]


@dataclass(frozen=True, slots=True)
class Chair:
    """Object hallucination in captions.

    Args:
        mentions: all object mentions. hallucinated: those absent from the image. captions: captions scored.
        hallucinated_captions: captions with at least one. recalled, objects: true objects mentioned, and all of them.
        words: words in all captions.
    """

    mentions: int
    hallucinated: int
    captions: int
    hallucinated_captions: int
    recalled: int
    objects: int
    words: int

    @property
    def instance(self) -> float:
        """CHAIRi: hallucinated mentions / all mentions."""
        return self.hallucinated / self.mentions if self.mentions else 0.0

    @property
    def sentence(self) -> float:
        """CHAIRs: captions with a hallucination / captions."""
        return self.hallucinated_captions / self.captions if self.captions else 0.0

    @property
    def recall(self) -> float:
        """True objects that were mentioned / true objects: a silent model has no hallucination and no recall."""
        return self.recalled / self.objects if self.objects else 0.0


def _units(text: str) -> list[str]:
    """Split a normalised text at white space; CJK characters, which have none between them, stand alone."""
    return re.sub(r"([㐀-鿿])", r" \1 ", normalise(text)).split()


def mentioned(text: str, vocabulary: Mapping[str, str]) -> list[str]:
    """List the objects a caption mentions, in order: the longest name wins, so "hot dog" is no dog.

    Args:
        text: a caption.
        vocabulary: surface form (normalised) -> object name; synonyms share an object name.
    """
    words = _units(text)
    vocabulary = {" ".join(_units(surface)): name for surface, name in vocabulary.items()}
    longest = max((len(v.split()) for v in vocabulary), default=0)
    found, i = [], 0
    while i < len(words):
        for n in range(min(longest, len(words) - i), 0, -1):
            if (name := vocabulary.get(" ".join(words[i : i + n]))) is not None:
                found.append(name)
                i += n - 1
                break
        i += 1
    return found


def chair(captions: Sequence[str], truths: Sequence[set[str]], vocabulary: Mapping[str, str]) -> Chair:
    """Count object mentions that the image does not hold.

    Args:
        captions: one an image.
        truths: the objects that the image holds.
        vocabulary: see `mentioned`.
    """
    mentions = hallucinated = sentences = recalled = objects = 0
    for text, truth in zip(captions, truths, strict=True):
        names = mentioned(text, vocabulary)
        wrong = [n for n in names if n not in truth]
        mentions += len(names)
        hallucinated += len(wrong)
        sentences += bool(wrong)
        recalled += len(truth & set(names))
        objects += len(truth)
    words = sum(len(tokenise(c)) for c in captions)
    return Chair(mentions, hallucinated, len(captions), sentences, recalled, objects, words)
