"""Published sets: the real files where they are, and small ones with everything that can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from fastmllm.data.sample import Sample
from fastmllm.eval import intervals
from fastmllm.eval.baselines import WORDS, baselines, baselines_table
from fastmllm.eval.controls import words_answer
from fastmllm.eval.runner import EvalConfig, evaluate_tasks
from fastmllm.eval.sets import LOADERS, SetError, describe, load_sets
from fastmllm.eval.sets.reading import Reader

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 100)


def _real(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"no {name} beside the checkout")
    (loaded,) = load_sets({name: DATA / name}, images=False)
    return loaded


def _value(rows, line, metric):
    return next(r.estimate for r in rows if (r.line, r.metric) == (line, metric))


def test_pope_is_answered_by_the_objects_name():
    loaded = _real("pope")
    assert (len(loaded.tasks[0].samples()), loaded.notes, loaded.skipped) == (9000, [], {})
    rows = baselines([loaded])
    assert _value(rows, WORDS, "accuracy, popular").value == pytest.approx(0.868, abs=0.015)
    assert _value(rows, WORDS, "accuracy, random").value == pytest.approx(0.685, abs=0.02)
    assert _value(rows, WORDS, "accuracy, adversarial").value == pytest.approx(0.687, abs=0.02)
    assert _value(rows, WORDS, "accuracy, popular").count == 3000
    assert _value(rows, "majority", "accuracy, mean of splits").value == 0.5


def test_amber_existence_is_answered_by_no():
    loaded = _real("amber")
    assert [len(t.samples()) for t in loaded.tasks] == [14216, 1004]
    assert (loaded.notes, loaded.skipped) == ([], {})
    yes_no = loaded.tasks[0]
    items = [s for s in yes_no.samples() if s.source == "discriminative-hallucination"]
    scored = yes_no.scored(["No"] * len(items), items)
    assert yes_no.metrics["accuracy, existence"](scored, 0).value == 1.0
    assert yes_no.metrics["F1, existence, amber"](scored, 0).count == 4924


def test_nlvr_sentences_are_true_and_false():
    loaded = _real("nlvr")
    (task,) = loaded.tasks
    items = task.samples()
    assert len(items) == 5934
    scored = task.scored(["true"] * len(items), items)
    assert task.metrics["accuracy"](scored, 0).value == pytest.approx(0.553, abs=0.001)
    consistent = task.metrics["consistency"](scored, 0)
    assert (consistent.count, consistent.value < 0.1) == (267, True)


def _write(path, value, lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(value) if lines else json.dumps(value))


def _touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"image")


def _pope(folder):
    rows = [
        {
            "question_id": i,
            "image": f"{i // 2}.jpg",
            "text": f"Is there a thing {i % 3}?",
            "label": ["yes", "no"][i % 2],
        }
        for i in range(8)
    ]
    for split in ("random", "popular", "adversarial"):
        _write(folder / f"coco_pope_{split}.json", [json.dumps(r) for r in rows], lines=True)
    bad = [
        "{", "[1]", '{"question_id": 9}', json.dumps(rows[0]),
        json.dumps(rows[1] | {"question_id": 10, "label": "maybe"}),
        json.dumps(rows[1] | {"question_id": 11, "image": "../../etc/passwd"}),
        json.dumps(rows[1] | {"question_id": 12, "image": "/etc/passwd"}),
        json.dumps(rows[1] | {"question_id": 13, "image": "gone.jpg"}),
        json.dumps(rows[1] | {"question_id": 14, "text": 3}),
    ]  # fmt: skip
    path = folder / "coco_pope_random.json"
    path.write_text(path.read_text() + "\n" + "\n".join(bad))
    for i in range(4):
        _touch(folder / "val2014" / f"{i}.jpg")
    return rows


def test_malformed_rows_are_counted_and_listed(tmp_path):
    _pope(tmp_path)
    (loaded,) = load_sets({"pope": tmp_path})
    assert len(loaded.tasks[0].samples()) == 24
    assert loaded.skipped == {
        "no JSON": 1, "malformed row (TypeError)": 1, "malformed row (KeyError)": 1, "duplicate id": 1,
        "label is neither yes nor no": 1, "image outside of the folder": 2, "image missing": 1, "text is no text": 1,
    }  # fmt: skip
    assert "coco_pope_random.json:9: no JSON" in loaded.listed
    assert "pope: 8 questions in coco_pope_random.json, 3000 are published" in loaded.notes
    assert any("… and 4 more" in line for line in describe(loaded))


class Says:
    def __init__(self, text):
        self.text = text

    def answer(self, samples, max_new_tokens):
        return [self.text(s) for s in samples]

    def score(self, samples):
        return [[float(c == s.answer) for c in s.choices] for s in samples]


def test_pope_beside_its_published_scorers(tmp_path):
    _pope(tmp_path)
    (loaded,) = load_sets({"pope": tmp_path})

    def wordy(sample):
        return f"{'Yes' if sample.answer == 'yes' else 'No'}, I looked." if sample.image else ""

    report = evaluate_tasks(Says(wordy), loaded.tasks, EvalConfig())
    values = {r.metric: r.estimate.value for r in report.rows if r.condition == "model"}
    assert values["F1, mean of splits"] == values["F1, mean of splits, vlmevalkit"] == 1.0
    assert values["F1, mean of splits, pope"] == 1.0
    assert values["F1, mean of splits, lmms-eval"] == 0.0
    assert values["yes ratio, popular"] == 0.5


def _science(folder):
    problem = {
        "question": "Which is red?", "choices": ["a rose", "the sky", "grass"], "answer": 0, "hint": "", "image": None,
        "subject": "natural science", "grade": "grade3", "split": "test",
    }  # fmt: skip
    problems = {str(i): problem | {"answer": i % 3} for i in range(6)}
    problems["1"] |= {"image": "image.png", "subject": "social science", "grade": "grade8"}
    problems["2"] |= {"hint": "Look."}
    problems["7"] = problem | {"answer": 3}
    problems["8"] = problem | {"image": "image.png"}
    _write(folder / "problems.json", problems)
    _write(folder / "pid_splits.json", {"test": [*map(str, range(6)), "7", "8", "9"]})
    _touch(folder / "test" / "1" / "image.png")


def test_science_qa_by_letter_rotated_and_ranked(tmp_path):
    _science(tmp_path)
    (loaded,) = load_sets({"scienceqa": tmp_path})
    assert loaded.skipped == {"answer out of range": 1, "image missing": 1, "no problem of this id": 1}
    letters = Says(lambda s: f"({'ABC'[s.choices.index(s.answer)]})")
    report = evaluate_tasks(letters, loaded.tasks, EvalConfig())
    assert report.get("scienceqa").estimate.value == 1.0
    assert report.get("scienceqa", metric="accuracy, lmms-eval").estimate.value == 0.0  # "(A)"
    assert report.get("scienceqa", metric="accuracy, IMG").estimate.count == 1
    assert report.get("scienceqa", metric="accuracy, NO").estimate.count == 4
    assert report.get("scienceqa", metric="accuracy, G7-12").estimate.count == 1
    assert report.get("scienceqa, circular").estimate.value == 1.0
    assert report.get("scienceqa, circular").estimate.count == 6
    assert report.get("scienceqa, ranked").estimate.value == 1.0
    lazy = evaluate_tasks(Says(lambda s: "A"), loaded.tasks[:2], EvalConfig())
    assert lazy.get("scienceqa").estimate.value == pytest.approx(1 / 3)
    assert lazy.get("scienceqa, circular").estimate.value == 0.0  # one letter is not right for every rotation


def test_short_answers(tmp_path):
    easy, gqa, vqa, text = (tmp_path / n for n in ("easy", "gqa", "vqa", "text"))
    _write(easy / "answers.txt", ["red", "circle", "yes", "no"], lines=True)
    _write(
        easy / "test" / "questions.json",
        [["what color?", "red", 0], ["what color?", "pink", 0], ["x"], ["is it?", "yes", 5]],
    )
    _touch(easy / "test" / "images" / "0.png")
    _write(
        gqa / "testdev_balanced_questions.json",
        {"a": {"question": "Who?", "imageId": "n1", "answer": "woman"}, "b": []},
    )
    _touch(gqa / "images" / "n1.jpg")
    answers = [{"answer": a} for a in ["2"] * 3 + ["3"] * 7]
    note = {"question_id": 1, "answers": answers, "answer_type": "number", "image_id": 42}
    _write(vqa / "v2_mscoco_val2014_annotations.json", {"annotations": [note]})
    asked = [{"question_id": i, "image_id": 42, "question": "How many?"} for i in (1, 2)]
    _write(vqa / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    _touch(vqa / "val2014" / "COCO_val2014_000000000042.jpg")
    _write(
        text / "TextVQA_0.5.1_val.json",
        {"data": [{"question_id": 1, "image_id": "x", "question": "?", "answers": ["Stop"] * 10}]},
    )
    _touch(text / "train_images" / "x.jpg")
    loaded = load_sets({"easy-vqa": easy, "gqa": gqa, "vqav2": vqa, "textvqa": text})
    assert [dict(one.skipped) for one in loaded] == [
        {"answer out of range": 1, "malformed row (ValueError)": 1, "image missing": 1},
        {"malformed row (TypeError)": 1}, {"no annotation of this id": 1}, {},
    ]  # fmt: skip
    right = {"easy-vqa": "red", "gqa": "The woman.", "vqav2": "two", "textvqa": "stop"}
    report = evaluate_tasks(Says(lambda s: right[s.task]), [t for one in loaded for t in one.tasks], EvalConfig())
    assert report.get("easy-vqa").estimate.value == 1.0
    assert report.get("gqa").estimate.value == 1.0
    assert report.get("vqav2").estimate.value == pytest.approx(0.3 * 2 / 3 + 0.7)
    assert report.get("vqav2", metric="accuracy, number").estimate.value == report.get("vqav2").estimate.value
    assert report.get("textvqa").estimate.value == 1.0
    assert report.get("textvqa", metric="accuracy, official script").estimate.value == 0.0  # all ten agree on "Stop"


def test_flickr(tmp_path):
    rows = [
        {"filename": f"{i}.jpg", "split": "test", "sentences": [{"raw": f"a dog number {i} runs fast"}] * 5}
        for i in range(3)
    ]
    rows += [
        {"filename": "9.jpg", "split": "train", "sentences": []},
        {"filename": "8.jpg", "split": "test", "sentences": []},
    ]
    _write(tmp_path / "dataset_flickr30k.json", {"images": rows})
    for i in range(3):
        _touch(tmp_path / "flickr30k-images" / f"{i}.jpg")
    (loaded,) = load_sets({"flickr30k": tmp_path})
    assert loaded.skipped == {"no captions, or an empty one": 1}
    report = evaluate_tasks(
        Says(lambda s: f"a dog number {Path(s.image or '7.jpg').stem} runs fast"), loaded.tasks, EvalConfig()
    )
    assert report.get("flickr30k", metric="BLEU-4").estimate.value == pytest.approx(1.0)
    assert report.get("flickr30k", metric="ROUGE-L").estimate.value == pytest.approx(1.0)
    assert report.get("flickr30k").estimate.value > report.get("flickr30k", "wrong image").estimate.value


@pytest.mark.parametrize("name", LOADERS)
def test_a_missing_set_says_what_to_put_where(name, tmp_path):
    with pytest.raises(SetError, match=rf"{name}: .*nowhere is no folder; it must hold .*\w"):
        load_sets({name: tmp_path / "nowhere"})
    with pytest.raises(SetError, match=rf"{name}: .* has no .*; it must hold "):
        load_sets({name: tmp_path})


def test_unknown_sets_and_damaged_files(tmp_path):
    with pytest.raises(SetError, match="'mme' is unknown; known: pope, amber"):
        load_sets({"mme": tmp_path})
    (tmp_path / "a.json").write_text("{")
    reader = Reader("gqa", tmp_path, "a.json")
    with pytest.raises(SetError, match="is no JSON"):
        reader.json(tmp_path / "a.json", dict)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(SetError, match="holds a list, not a dict"):
        reader.json(tmp_path / "a.json", dict)


def test_words_alone_are_learned_of_other_images_of_the_same_source():
    samples = [
        Sample(id=f"{split}{i}", prompt="Is it?", answer=answer, task="t", source=split, image=f"{i}.png")
        for split, answer in (("a", "yes"), ("b", "no")) for i in range(10)
    ]  # fmt: skip
    assert words_answer(samples) == [s.answer for s in samples]
    lonely = [Sample(id=str(i), prompt=f"Is {i}?", answer="yes", task="t", image=f"{i}.png") for i in range(9)]
    odd = [*lonely, Sample(id="9", prompt="Is 9?", answer="no", task="t", image="9.png")]
    assert words_answer(odd) == ["yes"] * 10  # never asked of the other half: its most frequent answer


def test_the_table_of_baselines(tmp_path):
    _pope(tmp_path)
    console = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(baselines_table(baselines(load_sets({"pope": tmp_path}, images=False))))
    assert "words alone" in console.export_text()
