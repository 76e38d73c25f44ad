"""Tasks of contrasting scenes (fastmllm.data.hallucination): statements, each with its partner, and choices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fastmllm.data.sample import Sample
from fastmllm.eval.parsing import parse_yes_no
from fastmllm.eval.task import Metric, Task, among, as_it_is, of_sums, share_of, whole_groups
from fastmllm.eval.yes_no import confusion, scores_of

FALSE_YES = "false yes"  # the hallucination rate: "yes" to what is not so


def contrast_yes_no(name: str, items: Sequence[Sample]) -> Task:
    """Make a task of statements, each asked of a scene where it is true and of one where it is not.

    "false yes" is the share of false statements that were affirmed, for all and for each kind; qAcc is the share of
    statements right for both scenes, which an answer that does not look cannot be; fAcc that of scenes with all
    statements right.
    """

    def score(parsed: str | None, sample: Sample) -> dict[str, float]:
        label, false = ("yes" if sample.truth["true"] else "no"), not sample.truth["true"]
        counts = {"right": float(parsed == label), "yes": float(parsed == "yes"), "false": float(false)}
        return counts | {FALSE_YES: float(false and parsed == "yes")} | confusion(parsed, label)  # type: ignore[arg-type]

    metrics: dict[str, Metric] = {
        "accuracy": share_of("right"), FALSE_YES: share_of(FALSE_YES, "false"),
        "qAcc": whole_groups(lambda s: s.truth["question"]), "fAcc": whole_groups(lambda s: s.image or s.id),
        "F1": of_sums(lambda sums: scores_of(sums)["F1"]), "yes ratio": share_of("yes"),
    }  # fmt: skip
    for key in ("dimension", "kind"):
        for value in dict.fromkeys(s.truth[key] for s in items):
            keep = partial(_is, key, value)
            metrics[f"accuracy, {value}"] = among(keep, share_of("right"))
            metrics[f"{FALSE_YES}, {value}"] = among(keep, share_of(FALSE_YES, "false"))
    return Task(
        name=name, documents=items, prompt=lambda sample: sample, parse=lambda text, sample: parse_yes_no(text),
        score=score, closed=tuple(sorted({c for s in items for c in s.choices})), metrics=metrics,
    )  # fmt: skip


def contrast_choice(name: str, items: Sequence[Sample]) -> Task:
    """Make a task of forced choices by log-probability: the right answer is the other scene's wrong one."""
    metrics: dict[str, Metric] = {
        "forced choice": share_of("right"), "qAcc": whole_groups(lambda s: s.truth["question"])
    }  # fmt: skip
    for kind in dict.fromkeys(s.truth["kind"] for s in items):
        metrics[f"forced choice, {kind}"] = among(partial(_is, "kind", kind), share_of("right"))
    return Task(
        name=name, documents=items, prompt=lambda sample: sample, parse=as_it_is, rank=True, reads=False,
        score=lambda parsed, sample: {"right": float(parsed == sample.answer)}, metrics=metrics,
    )  # fmt: skip


def _is(key: str, value: str, sample: Sample) -> bool:
    return sample.truth[key] == value
