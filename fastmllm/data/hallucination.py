"""Questions about pairs of contrasting scenes, in English and Chinese; their words alone say nothing.

Each statement is asked of both scenes of its pair, and is true of one; each scene has one true and one false statement.
So every wording has as many "yes" as "no", every picture too, and every forced choice is right as often as wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastmllm.data.canvas import Habits
from fastmllm.data.contrast import Contrast, contrasts
from fastmllm.data.images import save_png
from fastmllm.data.progress import track
from fastmllm.data.sample import Sample
from fastmllm.data.scenes import LIST_PROMPT, Scene, draw, listed
from fastmllm.data.tasks import PROMPTS, Subject, be, with_article

TASKS = ("hallucination", "hallucination_choice", "hallucination_caption")
YES_NO = {"en": ("yes", "no"), "zh": ("是", "否")}
LIST = {"en": LIST_PROMPT, "zh": "图中有什么？"}
ZH = {
    "red": "红色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "two": "两", "three": "三", "four": "四",
    "upright": "正着的", "upside down": "倒着的", "larger": "大", "smaller": "小", "left of": "左边",
    "right of": "右边", "above": "上面", "below": "下面",
}  # fmt: skip


def statement(pair: Contrast, which: int, language: str) -> str:
    """Return the yes/no question about a pair's first or second value."""
    names = [subject.names[language] for subject in pair.about]
    if not pair.values:
        if language == "zh":
            return f"图中有{names[which]}吗？"
        return PROMPTS["en"]["yes_no"].format(be=be(names[which]).capitalize(), name=with_article(names[which]))
    return (_english if language == "en" else _chinese)(pair.kind, names, pair.values[which])


def _english(kind: str, names: Sequence[str], value: str) -> str:
    thing, verb = f"the {names[0]}", be(names[0]).capitalize()
    return {
        "attribute, colour": f"{verb} {thing} on a {value} card?",
        "attribute, size": f"{verb} {thing} drawn {value} than the {names[-1]}?",
        "attribute, number": f"Are there exactly {value} drawings of {with_article(names[0])}?",
        "attribute, state": f"{verb} {thing} {value}?",
    }.get(kind, f"{verb} {thing} {value} the {names[-1]}?")


def _chinese(kind: str, names: Sequence[str], value: str) -> str:
    thing, value = names[0], ZH[value]
    return {
        "attribute, colour": f"{thing}后面的卡片是{value}的吗？",
        "attribute, size": f"{thing}画得比{names[-1]}{value}吗？",
        "attribute, number": f"图中正好有{value}个{thing}吗？",
        "attribute, state": f"{thing}是{value}吗？",
    }.get(kind, f"{thing}在{names[-1]}的{value}吗？")


def choice(pair: Contrast, language: str) -> tuple[str, tuple[str, str]]:
    """Return the question that both scenes answer differently, and the answer of each."""
    names = [subject.names[language] for subject in pair.about]
    if not pair.values:
        return {"en": PROMPTS["en"]["exists"], "zh": "图中有哪一样？"}[language], (names[0], names[1])
    first, second = sorted(pair.values)  # in one order, whichever is true of the first scene
    if language == "en":
        thing, other, verb = f"the {names[0]}", f"the {names[-1]}", be(names[0])
        asked = {
            "attribute, colour": f"What colour is the card behind {thing}?",
            "attribute, size": f"{verb.capitalize()} {thing} drawn {first} or {second} than {other}?",
            "attribute, number": f"How many drawings of {with_article(names[0])} are there?",
            "attribute, state": f"{verb.capitalize()} {thing} {first} or {second}?",
        }.get(pair.kind, f"{verb.capitalize()} {thing} {first} or {second} {other}?")
        return asked, (pair.values[0], pair.values[1])
    thing, first, second = names[0], ZH[first], ZH[second]
    asked = {
        "attribute, colour": f"{thing}后面的卡片是什么颜色？",
        "attribute, size": f"{thing}画得比{names[-1]}{first}还是{second}？",
        "attribute, number": f"图中有几个{thing}？",
        "attribute, state": f"{thing}是{first}还是{second}？",
    }.get(pair.kind, f"{thing}在{names[-1]}的{first}还是{second}？")
    counter = "个" if pair.kind == "attribute, number" else ""
    return asked, (ZH[pair.values[0]] + counter, ZH[pair.values[1]] + counter)


def hallucination_samples(
    pair: Contrast, paths: tuple[Path, Path], *, language: str, split: str, vocabulary: Sequence[str]
) -> dict[str, list[Sample]]:
    """Ask everything about a pair: two statements and one choice of both scenes; captions where existence is asked.

    Args:
        pair: two scenes.
        paths: their pictures.
        language: of the questions and answers.
        split: part of the ids.
        vocabulary: names that a caption may mention.

    Returns:
        The tasks of `TASKS`. A sample's truth has its pair as "cluster", "question" (one for both scenes), "kind" and
        "dimension" (existence, attribute or relation).
    """
    name = f"{pair.kind}/{pair.index}"
    yes, no = YES_NO[language]
    prompt, answers = choice(pair, language)
    made: dict[str, list[Sample]] = {task: [] for task in TASKS}

    def sample(task: str, number: int, suffix: str, asked: str, answer: str, more: Mapping[str, Any], **rest: Any):
        scene = pair.scenes[number]
        truth: dict[str, Any] = {"cluster": name, "kind": pair.kind, "dimension": pair.kind.partition(",")[0]}
        truth |= {"objects": _names(scene, language)}
        made[task].append(
            Sample(
                id=f"{split}/{task}/{language}/{name}/{'ab'[number]}{suffix}", prompt=asked, answer=answer, task=task,
                image=str(paths[number]), language=language, truth=truth | dict(more),
                source="+".join(sorted({placed.subject.source for placed in scene.objects})), **rest,
            )
        )  # fmt: skip

    for number in (0, 1):
        for which in (0, 1):
            asked = statement(pair, which, language)
            answer = yes if which == number else no
            more = {"question": f"{name}/{which}", "true": which == number}
            sample("hallucination", number, f"/{which}", asked, answer, more, choices=(yes, no))
        right, wrong = answers[number], answers[1 - number]
        sample("hallucination_choice", number, "", prompt, right, {"question": name}, choices=(right, wrong))
        if not pair.values:
            names = _names(pair.scenes[number], language)
            text = listed(names) if language == "en" else "、".join(names)
            sample(
                "hallucination_caption", number, "", LIST[language], text, {"vocabulary": list(vocabulary)},
                references=(text,),
            )  # fmt: skip
    return made


def _names(scene: Scene, language: str) -> list[str]:
    return list(dict.fromkeys(placed.subject.names[language] for placed in scene.objects))


def hallucination_set(
    subjects: Sequence[Subject], *, pool: Callable[[Subject], bool], languages: Sequence[str], num: int, split: str,
    seed: int, habits: Habits, folder: Path, key: str, grid: int = 2, size: int = 224,
) -> tuple[dict[str, list[Sample]], list[str]]:  # fmt: skip
    """Make the set, and draw the pictures that are not in the cache.

    Args:
        subjects: all drawings of the split: what a caption may name.
        pool: which of them stand in scenes; those without a name in every language are left out.
        languages, num, split, seed, habits, grid, size: as `contrast.contrasts` and `hallucination_samples`.
        folder: where the pictures go.
        key: names the drawings in the files' names, so that a path always means the same pixels.

    Returns:
        Task -> samples, "_zh" behind the name of a Chinese one; and notes about what could not be asked.
    """
    named = [s for s in subjects if pool(s) and set(languages) <= set(s.names)]
    pairs, notes = contrasts(named, num=num, seed=seed, habits=habits, grid=grid, size=size)
    words = {language: sorted({s.names[language] for s in subjects if language in s.names}) for language in languages}
    tasks: dict[str, list[Sample]] = {}
    for pair in track(pairs, f"drawing {split} contrasts", len(pairs)):
        first, second = (_picture(scene, folder, f"{split}-contrast-{key}") for scene in pair.scenes)
        for language in languages:
            asked = hallucination_samples(
                pair, (first, second), language=language, split=split, vocabulary=words[language]
            )
            for task, samples in asked.items():
                tasks.setdefault(task if language == "en" else f"{task}_{language}", []).extend(samples)
    return {task: samples for task, samples in tasks.items() if samples}, notes


def _picture(scene: Scene, folder: Path, stem: str) -> Path:
    parts = [(Path(p.subject.path).name, p.subject.source, p.box, p.card, p.upside_down) for p in scene.objects]
    digest = hashlib.sha256(repr((scene.grid, scene.size, parts)).encode()).hexdigest()[:16]
    path = folder / f"{stem}-{digest}.png"
    if not path.exists():
        save_png(draw(scene), path)
    return path
