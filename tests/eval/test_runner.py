"""The runner: a seeing model beats every control, a blind one beats none, and nothing is lost on the way."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from fastmllm.data.sample import Sample
from fastmllm.eval import controls
from fastmllm.eval.intervals import share
from fastmllm.eval.runner import CONDITIONS, EvalConfig, Report, Row, evaluate

NAMES = [f"thing {i}" for i in range(40)]
GROUPS = ["animal", "food", "tool", "place"]


def _samples():
    name, group, exists, caption, yes_no = [], [], [], [], []
    for i, n in enumerate(NAMES):
        common = {"image": f"/img/{n}.png", "truth": {"concept": n, "objects": [n]}}
        name.append(Sample(id=f"n{i}", prompt="What?", answer=n, task="name", **common))
        group.append(Sample(id=f"g{i}", prompt="Kind?", answer=GROUPS[i % 4], task="group", **common))
        absent = NAMES[(i + 1) % 40]
        exists.append(Sample(id=f"e{i}", prompt="What?", answer=n, task="exists", choices=(n, absent), **common))
        text = f"a drawing of a {n}"
        caption.append(
            Sample(id=f"c{i}", prompt="Describe.", answer=text, task="caption", references=(text,), **common)
        )
        shown = n if i % 2 else absent
        yes_no.append(
            Sample(id=f"y{i}", prompt=f"Is there a {shown}?", answer=["no", "yes"][i % 2], task="yes_no", **common)
        )
    return {"name": name, "group": group, "exists": exists, "caption": caption, "yes_no": yes_no}


class Seeing:
    """Reads the name off the image's path."""

    def _subject(self, sample):
        return None if sample.image is None else sample.image.split("/")[-1][:-4]

    def answer(self, samples, max_new_tokens):
        return [self._say(s, self._subject(s)) for s in samples]

    def _say(self, sample, subject):
        if subject is None:
            return "I see nothing."
        if sample.task == "group":
            return GROUPS[NAMES.index(subject) % 4]
        if sample.task == "caption":
            return f"a drawing of a {subject}"
        if sample.task == "yes_no":
            return "Yes." if subject in sample.prompt else "No."
        return subject.upper()

    def score(self, samples):
        return [[0.0 if c == self._subject(s) else -1.0 for c in s.choices] for s in samples]


class Blind(Seeing):
    def _subject(self, sample):
        return None


@pytest.fixture(scope="module")
def seen():
    samples = _samples()
    return evaluate(Seeing(), samples, samples, EvalConfig(gallery=20))


def test_a_seeing_model_beats_every_control(seen):
    for task in ("name", "group", "exists", "caption"):
        assert seen.get(task).estimate.value == pytest.approx({"caption": 10.0}.get(task, 1.0))
        assert seen.beats_controls(task), task
    assert seen.get("exists", controls.BLIND).estimate.value == 0.0  # ties are no knowledge
    assert seen.get("name", controls.WRONG).estimate.value == 0.0
    assert seen.get("name", controls.BLIND).unparsed == 0.0  # it picks from the closed set
    assert seen.get("retrieval", metric="R@1 image to text").estimate.value == 1.0
    assert seen.get("yes_no", metric="yes ratio").estimate.value == 0.5
    assert seen.get("caption", controls.WRONG, "CHAIRs").estimate.value == 1.0


def test_a_blind_model_beats_none():
    samples = _samples()
    report = evaluate(Blind(), samples, samples, EvalConfig(gallery=0))
    assert not any(report.beats_controls(task) for task in ("name", "group", "exists"))


def test_blind_is_the_most_probable_answer_of_the_closed_set():
    """One that says nothing without its image would lie below chance, and any model above it."""

    class Prior(Seeing):
        asked = 0

        def score(self, samples):
            self.asked += len(samples)
            return [[float(c in ("food", "no")) for c in s.choices] for s in samples]

    samples = {task: _samples()[task] for task in ("group", "yes_no")}
    model = Prior()
    report = evaluate(model, samples, samples, EvalConfig(gallery=0))
    assert report.get("group", controls.BLIND).estimate.value == 0.25  # as good as its prior, no worse
    assert report.get("yes_no", controls.BLIND).estimate.value == 0.5
    assert model.asked == 1 + len({s.prompt for s in samples["yes_no"]})  # equal questions once


def test_every_condition_says_what_could_not_be_parsed():
    class Mute(Seeing):
        def answer(self, samples, max_new_tokens):
            return ["?" if "3" in s.image else "thing 1" for s in samples]

    names = {"name": _samples()["name"]}
    report = evaluate(Mute(), names, names, EvalConfig(gallery=0))
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table())
    wrong = round(100 * report.get("name", controls.WRONG).unparsed)
    assert f"32 / 0 / {wrong} / 0 / 0" in console.export_text()


def test_every_answer_is_kept_and_the_table_prints(seen):
    assert len(seen.records) == 5 * 40 * len(CONDITIONS)
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(seen.table())
    assert "forced choice" in console.export_text()
    assert len(seen.to_json()) == len(seen.rows)


def test_wrong_images_never_show_the_right_subject():
    samples = _samples()["name"]
    samples += [replace(s, id=s.id + "b", image=s.image + "b") for s in samples]  # two images of each subject
    for seed in range(3):
        for before, after in zip(samples, controls.with_wrong_image(samples, seed), strict=True):
            assert after.image is not None
            assert after.image.removesuffix("b") != before.image.removesuffix("b")
    scenes = [Sample(id=str(i), prompt="How many?", answer="one", task="count", image=f"{i}.png") for i in range(5)]
    for before, after in zip(scenes, controls.with_wrong_image(scenes), strict=True):
        assert after.image not in (None, before.image)  # the same answer may be right by chance, as any answer may
    lonely = controls.with_wrong_image(samples[:1])
    assert lonely[0].image is None


def test_exact_match_is_of_the_whole_answer():
    items = _samples()["name"]

    class Wordy(Seeing):
        def _say(self, sample, subject):
            return f"a {subject} on a tree" if subject else ""

    report = evaluate(Wordy(), {"name": items}, {"name": items}, EvalConfig(gallery=0))
    assert report.get("name").estimate.value == 0.0
    assert report.get("name").unparsed == 0.0  # it can be read, and is no exact match


def test_controls_are_beaten_by_intervals_not_by_points():
    def row(condition, right):
        return Row("name", condition, "accuracy", share([i < right for i in range(20)]))

    close = Report(rows=[row("model", 12), *(row(c, 8) for c in CONDITIONS[1:])])
    assert not close.beats_controls("name")
    apart = Report(rows=[row("model", 19), *(row(c, 3) for c in CONDITIONS[1:])])
    assert apart.beats_controls("name")
    one_left = Report(rows=[row("model", 19), *(row(c, 3) for c in CONDITIONS[1:-1]), row(CONDITIONS[-1], 18)])
    assert not one_left.beats_controls("name")


def test_majority_is_the_training_sets():
    test = [Sample(id="1", prompt="?", answer="rare", task="name")] * 3
    train = [Sample(id="2", prompt="?", answer=a, task="name") for a in ("common", "common", "rare")]
    assert controls.majority_answer(test, train) == ["common"] * 3


def test_random_answers_come_from_the_closed_set():
    samples = _samples()["exists"]
    drawn = controls.random_answer(samples, NAMES)
    assert all(d in s.choices for d, s in zip(drawn, samples, strict=True))
    assert 5 < sum(d == s.answer for d, s in zip(drawn, samples, strict=True)) < 35
    assert set(controls.random_answer(_samples()["name"], NAMES)) <= set(NAMES)


def test_retrieval_goes_both_ways():
    """A model that scores the first name highest for every image still finds the right image for a name."""

    class Lopsided(Seeing):
        def score(self, samples):
            return [[10.0 * (c == s.choices[0]) + (c == self._subject(s)) for c in s.choices] for s in samples]

    items = {"name": _samples()["name"]}
    report = evaluate(Lopsided(), items, items, EvalConfig(gallery=20))
    assert report.get("retrieval", metric="R@1 image to text").estimate.value == 1 / 20
    assert report.get("retrieval", metric="R@1 text to image").estimate.value == 1.0


def test_a_limit_draws_images_not_the_first_classes():
    samples = [
        Sample(id=f"{name}{i}{q}", prompt="?", answer=name, task="name", image=f"{name}{i}.png")
        for name in ("a", "b", "c", "d") for i in range(10) for q in range(2)
    ]  # fmt: skip
    chosen = controls.limited(samples, 24)
    assert len(chosen) == 24
    assert {s.answer for s in chosen} == {"a", "b", "c", "d"}
    assert len({s.image for s in chosen}) == 12  # all questions of an image
    assert controls.limited(samples, 0) == samples
    assert chosen == controls.limited(samples, 24)


def test_majority_respects_the_choices():
    samples = _samples()["exists"][:2]
    train = [samples[1], samples[1]]
    assert controls.majority_answer(samples, train) == [samples[1].answer, samples[1].answer]
