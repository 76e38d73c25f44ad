"""Scores of yes/no questions: POPE's (Li et al., arXiv 2305.10355), and HallusionBench's consistency (2310.14566)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

Verdict = Literal["yes", "no"] | None
Compat = Literal["pope", "lmms-eval", "vlmevalkit"] | None


def confusion(verdict: Verdict, label: str) -> dict[str, float]:
    """Return what an answer adds to the counts; "yes" is positive, and an unparsed answer is in a cell of its own.

    Raises:
        ValueError: a label other than yes and no.
    """
    if label not in ("yes", "no"):
        raise ValueError(f"yes/no: the label is {label!r}; yes or no is needed")
    cells = {("yes", "yes"): "tp", ("yes", "no"): "fp", ("no", "no"): "tn", ("no", "yes"): "fn"}
    return {cells[verdict, label] if verdict else f"unparsed {label}": 1.0}


def scores_of(sums: Mapping[str, float], compat: Compat = None) -> dict[str, float]:
    """Return accuracy, precision, recall, F1, yes ratio and unparsed share of summed `confusion`s.

    Ours: an unparsed answer is wrong everywhere: it is missed where "yes" was right, and never a "yes". An undefined
    ratio is 0.

    Args:
        sums: of `confusion`.
        compat: what a published scorer makes of the same verdicts. "pope": fractions; it knows no unparsed ones, so
            they must not be there. "lmms-eval": unparsed answers leave precision and recall, and the yes ratio is
            that of the labels. "vlmevalkit": per cent; unparsed is "no" for precision and recall and wrong for
            accuracy.

    Raises:
        ValueError: an unknown `compat`, or unparsed verdicts with "pope".
    """
    tp, fp, tn, fn = (sums.get(cell, 0.0) for cell in ("tp", "fp", "tn", "fn"))
    lost_yes, lost_no = sums.get("unparsed yes", 0.0), sums.get("unparsed no", 0.0)
    total = tp + fp + tn + fn + lost_yes + lost_no
    if compat not in (None, "pope", "lmms-eval", "vlmevalkit"):
        raise ValueError(f"yes/no: compat {compat!r} is unknown; known: pope, lmms-eval, vlmevalkit, or None")
    if compat == "pope" and lost_yes + lost_no:
        raise ValueError('yes/no: POPE\'s scorer reads every answer; parse with parse_yes_no(text, compat="pope")')
    scores = {"accuracy": _ratio(tp + tn, total), "precision": _ratio(tp, tp + fp)}
    scores["recall"] = _ratio(tp, tp + fn + (0.0 if compat == "lmms-eval" else lost_yes))
    precision, recall = scores["precision"], scores["recall"]
    scores["F1"] = _ratio(2 * precision * recall, precision + recall)
    if compat == "vlmevalkit":
        return {name: 100 * value for name, value in scores.items()}
    scores["yes ratio"] = _ratio(tp + fn + lost_yes if compat == "lmms-eval" else tp + fp, total)
    return scores if compat else scores | {"unparsed": _ratio(lost_yes + lost_no, total)}


def yes_no_scores(verdicts: Sequence[Verdict], labels: Sequence[str], compat: Compat = None) -> dict[str, float]:
    """Score verdicts against labels; see `scores_of`.

    Raises:
        ValueError: lengths differ, or a label other than yes and no.
    """
    if len(verdicts) != len(labels):
        raise ValueError(f"yes/no: {len(verdicts)} verdicts, {len(labels)} labels; pair them by id")
    sums: dict[str, float] = {}
    for verdict, label in zip(verdicts, labels, strict=True):
        for cell, count in confusion(verdict, label).items():
            sums[cell] = sums.get(cell, 0.0) + count
    return scores_of(sums, compat)


def mean_over_splits(splits: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Average each score over POPE's splits, as LLaVA's papers report it ("POPE" there is the mean of three F1)."""
    if not splits:
        return {}
    names = next(iter(splits.values()))
    return {name: sum(scores[name] for scores in splits.values()) / len(splits) for name in names}


def consistency(
    correct: Sequence[bool], figures: Sequence[Hashable], questions: Sequence[Hashable]
) -> dict[str, float]:
    """Return HallusionBench's aAcc, fAcc and qAcc, 0 to 1.

    Args:
        correct: one verdict an item.
        figures: the item's image: fAcc is the share of images of which all questions are right.
        questions: the item's question, over its images: qAcc is the share of questions right for all of them, which
            an answer from the words alone cannot be where the answers differ.

    Raises:
        ValueError: lengths differ.
    """
    if not len(correct) == len(figures) == len(questions):
        raise ValueError(f"consistency: {len(correct)} verdicts, {len(figures)} figures, {len(questions)} questions")
    return {
        "aAcc": _ratio(float(sum(correct)), float(len(correct))),
        "fAcc": _whole(correct, figures),
        "qAcc": _whole(correct, questions),
    }


def _whole(correct: Sequence[bool], groups: Sequence[Hashable]) -> float:
    right: dict[Hashable, bool] = {}
    for verdict, group in zip(correct, groups, strict=True):
        right[group] = right.get(group, True) and bool(verdict)
    return _ratio(float(sum(right.values())), float(len(right)))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
