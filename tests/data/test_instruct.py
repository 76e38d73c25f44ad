"""Sets of questions, captions and boxes become conversations that training reads; bad records are listed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from tiny_shards import png

from fastmllm import data
from fastmllm.data.instruct.adapt import AdaptConfig, adapt
from fastmllm.data.instruct.questions import labels_of
from fastmllm.data.instruct.templates import SHIPPED, load_templates
from fastmllm.data.records import Record, read_records, write_records
from fastmllm.data.shard_index import Skipped
from fastmllm.data.shards import ShardSource, SourceConfig


def made(kind: str, *data: dict, languages: tuple[str, ...] = ("en", "zh"), **config: object) -> list:
    records = [Record(key=str(i), data=d) for i, d in enumerate(data)]
    templates = [load_templates(f"{kind}_{language}") for language in languages]
    return list(adapt(records, templates, AdaptConfig(kind=kind, **config), source="s"))


def said(sample: dict) -> tuple[str, str]:
    return sample["conversations"][0]["value"], sample["conversations"][1]["value"]


def test_vqa_in_both_languages_with_answer_formats() -> None:
    short, yes, number, chinese = made(
        "vqa",
        {"image": "a.png", "question": "What is red?", "answer": "the barn", "id": 7},
        {"image": "a.png", "question": "Is it red?", "answers": ["no", {"answer": "yes"}, "yes"]},
        {"image": "a.png", "question": "How many?", "answer": "3"},
        {"image": "a.png", "question": "这是什么颜色？", "answer": "红色"},
    )
    prompt, answer = said(short)
    assert prompt.startswith("<image>\n")
    assert "What is red?" in prompt
    assert prompt.endswith(tuple(load_templates("vqa_en").formats["short"]))
    assert (answer, short["id"], short["image"]) == ("the barn", "7", "a.png")
    assert said(yes)[1] == "yes"
    assert said(yes)[0].endswith(tuple(load_templates("vqa_en").formats["yes_no"]))
    assert said(number)[0].endswith(tuple(load_templates("vqa_en").formats["number"]))
    assert chinese["made"]["templates"] == "vqa_zh"
    assert said(chinese)[0].endswith(tuple(load_templates("vqa_zh").formats["short"]))


def test_choices_become_letters_and_bad_ones_are_listed() -> None:
    base = {"image": "a.png", "question": "Which?", "choices": ["a cat", "a dog", "B"]}
    found = made("vqa", *(base | {"answer": a} for a in (1, "a dog", "A", 3, -1, "C", True, "a cow", None)))
    answers = [said(s)[1] if isinstance(s, dict) else s.reason for s in found]
    out = "answer out of range"
    assert answers == ["B", "B", "A", out, out, "C", out, out, out]
    assert "A. a cat\nB. a dog\nC. B" in said(found[0])[0]
    texts = made("vqa", base | {"answer": "B"})
    assert said(texts[0])[1] == "C"  # an option's own text goes before a letter


def test_wrong_columns_are_listed_with_what_is_there() -> None:
    bad = [
        {"image": "a.png", "query": "What?", "answer": "x"}, {"image": "a.png", "question": "What?"},
        {"image": 3, "question": "What?", "answer": "x"},
        {"image": "a.png", "question": "<image> What?", "answer": "x"},
        {"image": "a.png", "question": "What?", "answers": [1, 2]},
        {"question": "Which?", "choices": "ab", "answer": 0},
        {"image": "a.png", "question": "Что это?", "answer": "дом"},
    ]  # fmt: skip
    found = made("vqa", *bad)
    assert [s.reason for s in found] == [
        "wrong columns", "wrong columns", "wrong images", "misplaced image", "wrong columns", "wrong columns",
        "no template",
    ]  # fmt: skip
    assert "image, query, answer" in found[0].detail


def test_phrasings_vary_by_seed_and_are_all_used() -> None:
    data = [{"image": f"{i}.png", "caption": f"a red barn number {i}"} for i in range(60)]
    first, again, other = (made("caption", *data, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    used = Counter(sample["made"]["phrasing"] for sample in first)
    assert set(used) == set(range(len(load_templates("caption_en").tasks["describe"])))
    bare = made("caption", *data, formats=0.0)
    forms = tuple(filter(None, load_templates("caption_en").formats["describe"]))
    assert not any(said(sample)[0].endswith(forms) for sample in bare)
    assert any(said(sample)[0].endswith(forms) for sample in first)
    several = made("caption", {"image": "a.png", "captions": ["one dog", "两只狗"], "id": "x"})
    assert [(s["id"], s["made"]["templates"]) for s in several] == [("x/0", "caption_en"), ("x/1", "caption_zh")]


def box_set(count: int = 40) -> list[dict]:
    labels = ("dog", "cat", "red ball", "tree", "狗", "猫")
    return [
        {
            "image": f"{i}.png", "width": 200, "height": 100,
            "boxes": [
                {"label": labels[i % 3], "box": [20, 10, 100, 60]},
                {"label": labels[3 + i % 3], "box": [0, 0, 50, 50]},
            ],
        }
        for i in range(count)
    ]  # fmt: skip


def test_boxes_ask_where_what_how_many_and_whether() -> None:
    data = box_set()
    labels = labels_of(Record(key="", data=d) for d in data)
    assert labels == {"dog": 14, "cat": 13, "red ball": 13, "tree": 14, "狗": 13, "猫": 13}
    found = made("boxes", *data, labels=labels, per_image=4)
    tasks = Counter(s["made"]["task"] for s in found)
    assert set(tasks) == {"locate", "name", "count", "exists"}
    assert sum(tasks.values()) == 4 * len(data)
    exists = [s for s in found if s["made"]["task"] == "exists"]
    answers = Counter(said(s)[1] for s in exists)
    assert answers["yes"] == answers["no"]
    assert answers["是"] == answers["否"] > 0
    by_image = {d["image"]: {b["label"] for b in d["boxes"]} for d in data}
    for sample in exists:
        named = [label for label in labels if label in said(sample)[0]]
        there = any(label in by_image[sample["image"]] for label in named)
        assert there == (said(sample)[1] in ("yes", "是")), sample
    where = next(s for s in found if s["made"]["task"] == "locate" and "dog" in said(s)[0])
    assert said(where)[1] == "[0.10, 0.10, 0.50, 0.60]"


def test_boxes_out_of_the_image_and_coco_sides() -> None:
    size = {"image": "a.png", "width": 100, "height": 50}
    good = made("boxes", size | {"annotations": [{"category": "dog", "bbox": [10, 5, 20, 25]}]}, per_image=9)
    assert {said(s)[1] for s in good} == {"[0.10, 0.10, 0.30, 0.60]", "dog", "1"}
    bad = [[90, 5, 20, 25], [10, 5, -3, 5], [float("nan"), 0, 1, 1], [1, 2, 3], "box"]
    found = made("boxes", *(size | {"annotations": [{"category": "dog", "bbox": b}]} for b in bad), {"image": "a.png"})
    assert [s.reason for s in found] == ["answer out of range"] * 3 + ["wrong columns"] * 3


def test_what_is_written_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    lines = [json.dumps({"image": "a.png", "question": f"What is {i}?", "answer": "red"}) for i in range(3)]
    (tmp_path / "set.jsonl").write_text("\n".join([*lines, "{broken", "[]"]))
    records = read_records(tmp_path / "set.jsonl")
    written = write_records(
        tmp_path / "out.jsonl", adapt(records, [load_templates("vqa_en")], AdaptConfig(kind="vqa"), source="s")
    )
    assert (written.records, written.skipped) == (3, {"wrong JSON": 2})
    listed = [json.loads(line) for line in (tmp_path / "out.skipped.jsonl").read_text().splitlines()]
    assert [row["key"] for row in listed] == ["3", "4"]
    source = ShardSource(SourceConfig(name="s", path=str(tmp_path / "out.jsonl")), cache=tmp_path / "cache")
    assert source.num_samples == 3
    assert source.sample(0, 0).turns[0].answer == "red"


def test_public_names_of_the_room_are_there() -> None:
    assert all(getattr(data, name) is not None for name in data.__all__)


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_shipped_templates_load_and_offer_several_phrasings(name: str) -> None:
    templates = load_templates(name)
    assert name == f"{templates.kind}_{templates.language}"
    assert max(len(phrasings) for phrasings in templates.tasks.values()) >= 2


@pytest.mark.parametrize(
    "text, message",
    [
        ("kind: quiz\nlanguage: en", "needs a kind"),
        ("kind: vqa\nlanguage: en\ntasks: {sing: [x]}", "'sing' is none of"),
        ("kind: vqa\nlanguage: en\ntasks: {ask: ['{box}']}", "box"), ("kind: vqa\nlanguage: en", "needs phrasings"),
        ("kind: caption\nlanguage: en\ntasks: {describe: [{prompt: x, answer: y}]}", "lacks {answer}"),
        ("kind: vqa\nlanguage: en\ntasks: {choose: ['{question}']}", "words lack"), ("a: [", "no YAML"),
        ("kind: vqa\nlanguage: en\ntask: {}", "unknown"),
    ],
)  # fmt: skip
def test_wrong_template_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_templates(tmp_path / "t.yaml")
    with pytest.raises(ValueError, match="vqa_en"):
        load_templates("no_such")


def test_templates_and_kind_must_agree() -> None:
    with pytest.raises(ValueError, match="of kind caption"):
        list(adapt([], [load_templates("vqa_en")], AdaptConfig(kind="caption")))
    skipped = Skipped(shard="s", key="1", reason="wrong JSON", detail="")
    assert list(adapt([skipped], [load_templates("vqa_en")], AdaptConfig(kind="vqa"))) == [skipped]
