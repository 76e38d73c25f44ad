"""POPE's scores against the published scripts, transcribed, and consistency by hand."""

from __future__ import annotations

import random

import pytest

from fastmllm.eval.yes_no import consistency, mean_over_splits, scores_of, yes_no_scores

LABELS = ["yes", "no"] * 50


def _answers(seed=0, parsed_only=False):
    rng = random.Random(seed)
    return [rng.choice(["yes", "no"] if parsed_only else ["yes", "no", None]) for _ in LABELS]


def test_popes_own():
    verdicts = _answers(parsed_only=True)
    pairs = list(zip(verdicts, LABELS, strict=True))
    tp, fp = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    tn, fn = pairs.count(("no", "no")), pairs.count(("no", "yes"))
    precision, recall = float(tp) / float(tp + fp), float(tp) / float(tp + fn)
    expected = {
        "accuracy": (tp + tn) / (tp + tn + fp + fn),
        "precision": precision,
        "recall": recall,
        "F1": 2 * precision * recall / (precision + recall),
        "yes ratio": verdicts.count("yes") / len(verdicts),
    }
    assert yes_no_scores(verdicts, LABELS, "pope") == expected  # to the bit
    assert yes_no_scores(verdicts, LABELS) == expected | {"unparsed": 0.0}
    with pytest.raises(ValueError, match="reads every answer"):
        yes_no_scores(_answers(), LABELS, "pope")


def test_lmms_evals_drops_unparsed_answers_and_counts_the_labels():
    verdicts = _answers()
    pairs = list(zip(verdicts, LABELS, strict=True))
    tp, fp, fn = pairs.count(("yes", "yes")), pairs.count(("yes", "no")), pairs.count(("no", "yes"))
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    assert yes_no_scores(verdicts, LABELS, "lmms-eval") == {
        "accuracy": sum(v == g for v, g in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "F1": 2 * (precision * recall) / (precision + recall),
        "yes ratio": 0.5,  # of any model
    }


def test_vlmevalkits_unknown_is_no_in_f1_and_wrong_in_accuracy():
    verdicts = _answers()
    pairs = list(zip(verdicts, LABELS, strict=True))
    tp, fp = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    precision, recall = tp / (tp + fp), tp / LABELS.count("yes")
    assert yes_no_scores(verdicts, LABELS, "vlmevalkit") == {
        "accuracy": sum(v == g for v, g in pairs) / len(pairs) * 100,
        "precision": precision * 100,
        "recall": recall * 100,
        "F1": 2 * (precision * recall) / (precision + recall) * 100,
    }


def test_ours_counts_unparsed_answers_as_wrong():
    scores = yes_no_scores(["yes", None, "no", None], ["yes", "yes", "no", "no"])
    assert scores == {
        "accuracy": 0.5, "precision": 1.0, "recall": 0.5, "F1": pytest.approx(2 / 3), "yes ratio": 0.25, "unparsed": 0.5
    }  # fmt: skip
    assert set(scores_of({}).values()) == {0.0}
    with pytest.raises(ValueError, match="yes or no is needed"):
        yes_no_scores(["yes"], ["maybe"])
    with pytest.raises(ValueError, match="pair them by id"):
        yes_no_scores(["yes"], [])
    with pytest.raises(ValueError, match="unknown; known: pope"):
        scores_of({}, "mme")


def test_the_mean_of_the_splits_is_of_their_scores():
    splits = {"random": {"F1": 0.9}, "popular": {"F1": 0.8}, "adversarial": {"F1": 0.4}}
    assert mean_over_splits(splits) == {"F1": pytest.approx(0.7)}
    assert mean_over_splits({}) == {}


def test_consistency():
    correct = [True, True, False, True]
    scores = consistency(correct, figures=["f1", "f1", "f2", "f2"], questions=["a", "b", "a", "b"])
    assert scores == {"aAcc": 0.75, "fAcc": 0.5, "qAcc": 0.5}
    # words alone: one answer a question, whose truth differs between its figures
    blind = consistency([True, False] * 4, figures=range(8), questions=[i // 2 for i in range(8)])
    assert (blind["aAcc"], blind["qAcc"]) == (0.5, 0.0)
    with pytest.raises(ValueError, match="1 verdicts, 0 figures"):
        consistency([True], [], [])
