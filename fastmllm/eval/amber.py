"""AMBER's scores (Wang et al., arXiv 2311.07397), without a language model or vectors from a hub."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from fastmllm.eval.captions import tokenise
from fastmllm.eval.yes_no import Verdict

DIMENSIONS = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}
ATTRIBUTES = ("state", "number", "action")
START = 0.001  # where its counters start, in metrics.txt, so that nothing is divided by zero


def discriminative_counts(verdict: Verdict, truth: str, kind: str) -> dict[str, float]:
    """Count what one yes/no answer adds to the scores of its dimensions; "No" is positive.

    Args:
        verdict: None, unparsed, is wrong and no "No". For the published figures a verdict is what the answer is, to
            the letter: `exact_verdict`.
        truth: "yes" or "no".
        kind: the annotation's type, such as "discriminative-attribute-state".

    Raises:
        ValueError: an unknown type, or a truth other than yes and no.
    """
    if kind not in DIMENSIONS or truth not in ("yes", "no"):
        raise ValueError(f"amber: type {kind!r} with truth {truth!r}; known types: {', '.join(DIMENSIONS)}")
    dimension = DIMENSIONS[kind]
    cells = {
        "all": True, "right": verdict == truth, "no": truth == "no", "said no": verdict == "no",
        "right no": verdict == truth == "no",
    }  # fmt: skip
    names = ("all", dimension, *(["attribute"] if dimension in ATTRIBUTES else []))
    return {f"{name}: {cell}": float(value) for name in names for cell, value in cells.items()}


def discriminative(sums: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Score summed `discriminative_counts` as AMBER's `inference.py` does: per cent, one decimal.

    Returns:
        dimension (all, existence, attribute, state, number, action, relation; those with questions) -> accuracy,
        precision, recall, F1. F1 comes of the rounded two, with 0.001 in its denominator for existence and 0.0001
        elsewhere.
    """
    names = dict.fromkeys(name.partition(":")[0] for name in sums)
    return {name: _scores(sums, name) for name in names if sums.get(f"{name}: all")}


def _scores(sums: Mapping[str, float], name: str) -> dict[str, float]:
    start = 3 * START if name == "attribute" else START  # three counters are added up

    def share(part: str, whole: str) -> float:
        return round(sums[f"{name}: {part}"] / (sums[f"{name}: {whole}"] + start) * 100, 1)

    precision, recall = share("right no", "said no"), share("right no", "no")
    p, r, epsilon = precision / 100, recall / 100, 0.001 if name == "existence" else 0.0001
    return {
        "accuracy": share("right", "all"), "precision": precision, "recall": recall,
        "F1": round(2 * p * r / (p + r + epsilon) * 100, 1),
    }  # fmt: skip


def exact_verdict(text: str) -> Verdict:
    """Read an answer as AMBER's scorer does: "Yes" or "No", to the letter."""
    return "yes" if text == "Yes" else "no" if text == "No" else None


def vocabulary_of(association: Mapping[str, Sequence[str]]) -> set[str]:
    """Return the words that AMBER counts: those of its association list, `relation.json`."""
    return set(association) | {word for words in association.values() for word in words}


def nouns_of(text: str, vocabulary: Collection[str]) -> list[str]:
    """List the vocabulary's words in a text, plurals as their singular, in order and with repeats.

    AMBER tags parts of speech with nltk and lemmatises with WordNet; here a word is a noun where the vocabulary has it,
    so "orange" the colour counts too.
    """
    found = []
    for word in tokenise(text):
        forms = [word]
        for ending, singular in (("ies", "y"), ("ves", "f"), ("es", ""), ("s", ""), ("men", "man")):
            if word.endswith(ending):
                forms.append(word.removesuffix(ending) + singular)
        found += [form for form in forms if form in vocabulary][:1]
    return found


def generative_counts(
    nouns: Sequence[str],
    truth: Sequence[str],
    likely: Sequence[str],
    association: Mapping[str, Sequence[str]],
    safe: Collection[str],
    synonyms: Mapping[str, Collection[str]],
    compat: Literal["amber"] | None = None,
) -> dict[str, float]:
    """Count what one description adds to CHAIR, Cover, Hal and Cog.

    Args:
        nouns: of the description, those of the vocabulary (`nouns_of`).
        truth: objects that the image holds. likely: what models like to invent for it (`hallu`).
        association: AMBER's `relation.json`: object -> words that stand for it.
        safe: words that are never counted as invented (`safe_words.txt`).
        synonyms: word -> words that mean the same, in place of spaCy's vectors (similarity above 0.8); {} = none.
        compat: "amber": where a noun belongs to several objects the first one's association counts before the
            object of that very name, as in `inference.py`.

    Returns:
        mentions, invented, objects, covered, likely, likely said, responses, clean responses.
    """
    owners = _owners(truth, association, compat == "amber")
    suspects = _owners(likely, association, compat == "amber")
    covered, said, invented = set(), set(), 0
    for noun in nouns:
        if noun in safe:
            continue
        if (owner := _first(noun, owners)) is not None:
            covered.add(owner)
            continue
        if (suspect := _first(noun, suspects)) is not None:
            said.add(suspect)
        if (suspect := _alike(noun, suspects, synonyms)) is not None:
            said.add(suspect)
        if (owner := _alike(noun, owners, synonyms)) is not None:
            covered.add(owner)
        else:
            invented += 1
    return {
        "mentions": float(len(nouns)),
        "invented": float(invented),
        "objects": float(len(truth)),
        "covered": float(len(covered)),
        "likely": float(len(likely)),
        "likely said": float(len(said)),
        "responses": 1.0,
        "clean": float(not invented),
    }


def generative(sums: Mapping[str, float]) -> dict[str, float]:
    """Return CHAIR, Cover, Hal and Cog, per cent to one decimal, of summed `generative_counts`; less Cover is worse."""

    def share(part: str, whole: str) -> float:
        return sums.get(part, 0.0) / (sums.get(whole, 0.0) + START) * 100

    return {
        "CHAIR": round(share("invented", "mentions"), 1),
        "Cover": round(share("covered", "objects"), 1),
        "Hal": round(100 - share("clean", "responses"), 1),
        "Cog": round(share("likely said", "likely"), 1),
    }


def amber_score(chair: float, f1: float) -> float:
    """Return the AMBER score, per cent: the mean of 100 - CHAIR and F1 over all yes/no questions."""
    return (100 - chair + f1) / 2


def _owners(
    objects: Sequence[str], association: Mapping[str, Sequence[str]], association_first: bool
) -> list[tuple[str, int]]:
    """List (word, place of its object); one object annotated twice has two places."""
    near = [(word, place) for place, name in enumerate(objects) for word in association.get(name, ())]
    own = [(name, place) for place, name in enumerate(objects)]
    return near + own if association_first else own + near


def _first(noun: str, owners: Sequence[tuple[str, int]]) -> int | None:
    return next((place for word, place in owners if word == noun), None)


def _alike(noun: str, owners: Sequence[tuple[str, int]], synonyms: Mapping[str, Collection[str]]) -> int | None:
    """Return the first object one of whose words means the same; every word means the same as itself."""
    return next(
        (p for word, p in owners if word == noun or word in synonyms.get(noun, ()) or noun in synonyms.get(word, ())),
        None,
    )
