"""From drawings and photographs to questions: name, group, caption, forced-choice and yes/no existence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastmllm.data.augment import rng_of
from fastmllm.data.emoji_groups import GROUP_NAMES_ZH
from fastmllm.data.sample import Sample

PROMPTS: dict[str, dict[str, str]] = {
    "en": {
        "name": "What is this?",
        "group": "What kind of thing is this?",
        "caption": "Describe the image.",
        "exists": "Which thing is in the image?",
        "yes_no": "{be} there {name} in the image?",
    },
    "zh": {"name": "这是什么？", "group": "这是哪一类？"},
}
# Names that take no article although they do not end in a plural s.
MASS = frozenset(
    {"bacon", "badminton", "bowling", "bread", "broccoli", "bubble tea", "butter", "canned food", "fire", "garlic"}
    | {"high voltage", "ping pong", "popcorn", "spaghetti", "sushi", "tennis"}
    | {"american football", "baseball", "basketball", "volleyball"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What an image shows.

    Args:
        key: unique name of the image, part of the samples' ids.
        path: image file.
        concept: unique name of the thing in the closed set (code point or class).
        source: design team, or split of a folder.
        group: what kind of thing; "" = unknown.
        names: language -> name.
        kind: "drawing" or "photo", for captions.
    """

    key: str
    path: str
    concept: str
    source: str
    group: str
    names: Mapping[str, str]
    kind: str = "drawing"


def be(name: str) -> str:
    """Return the verb for an English name: "is" the owl, "are" the grapes."""
    return "are" if _plural(name) else "is"


def _plural(name: str) -> bool:
    return name.endswith("s") and not name.endswith(("ss", "us")) and name not in MASS


def with_article(name: str) -> str:
    """Return an English name as a phrase: "an owl", "a bus", "grapes", "bread"."""
    if _plural(name) or name in MASS:
        return name
    vowel = name[0] in "aeio" or (name[0] == "u" and not name.startswith(("uni", "use", "eu")))
    return f"{'an' if vowel else 'a'} {name}"


def negatives(concepts: Mapping[str, str], seed: int) -> dict[str, list[str]]:
    """Return for each concept its absent, confusable ones, best first: the other members of its own group.

    The members of a group stand in a seeded circle, and the k-th negative of each is the k-th after it. So at
    every k each name is a negative exactly as often as it is an answer: object names alone tell a blind model
    nothing. A group of one joins the other groups of one (or, alone, the largest group).

    Args:
        concepts: concept -> group.
        seed: of the circles.

    Raises:
        ValueError: fewer than two concepts.
    """
    if len(concepts) < 2:
        raise ValueError(f"negatives: at least two concepts are needed, got {len(concepts)}")
    groups: dict[str, list[str]] = {}
    for concept in sorted(concepts):
        groups.setdefault(concepts[concept], []).append(concept)
    single = [members[0] for members in groups.values() if len(members) == 1]
    circles = [members for members in groups.values() if len(members) > 1]
    if len(single) == 1:
        max(circles, key=len).extend(single)
    elif single:
        circles.append(single)
    found: dict[str, list[str]] = {}
    for members in circles:
        order = [members[i] for i in rng_of("negatives", seed, members[0]).permutation(len(members))]
        for i, concept in enumerate(order):
            found[concept] = order[i + 1 :] + order[:i]
    return found


def ask(
    subjects: Sequence[Subject],
    *,
    split: str,
    languages: Sequence[str] = ("en",),
    num_negatives: int = 1,
    seed: int = 0,
) -> dict[str, list[Sample]]:
    """Ask every question about every image.

    Args:
        subjects: the images.
        split: "train" or "eval", part of the ids.
        languages: of name and group; the other tasks are in English.
        num_negatives: forced choices and pairs of yes/no questions for each image; at most as many as the
            concept's group offers.
        seed: of the negatives.

    Returns:
        Task -> samples; a language other than English has a task of its own ("name_zh"), whose samples' `task` is
        still "name". group and caption are absent where no subject has a group.
    """
    by_concept = {subject.concept: subject for subject in subjects}
    absent = negatives({concept: subject.group for concept, subject in by_concept.items()}, seed)
    # Training goes through the circle image by image, evaluation through the first ones of each image.
    turn: dict[str, int] = {}
    tasks: dict[str, list[Sample]] = {}
    for subject in subjects:
        for language in languages:
            if language in subject.names:
                _put(tasks, _name(subject, split, language))
                if subject.group:
                    _put(tasks, _group(subject, split, language))
        if subject.group:
            _put(tasks, _caption(subject, split))
        others = absent[subject.concept]
        start = turn.get(subject.concept, 0)
        count = min(num_negatives, len(others))
        turn[subject.concept] = start + count
        for k in range(count):
            other = by_concept[others[(start + k) % len(others)]]
            _put(tasks, _exists(subject, other, split, k))
            _put(tasks, _yes_no(subject, subject, split, k))
            _put(tasks, _yes_no(subject, other, split, k))
    return tasks


def _put(tasks: dict[str, list[Sample]], sample: Sample) -> None:
    key = sample.task if sample.language == "en" else f"{sample.task}_{sample.language}"
    tasks.setdefault(key, []).append(sample)


def _truth(subject: Subject) -> dict[str, object]:
    return {
        "concept": subject.concept,
        "name": subject.names["en"],
        "group": subject.group,
        "objects": [subject.names["en"]],
    }


def _sample(
    subject: Subject,
    split: str,
    task: str,
    prompt: str,
    answer: str,
    *,
    language: str = "en",
    suffix: str = "",
    choices: tuple[str, ...] = (),
    references: tuple[str, ...] = (),
    truth: Mapping[str, object] | None = None,
) -> Sample:
    return Sample(
        id=f"{split}/{task}/{language}/{subject.key}{suffix}",
        prompt=prompt,
        answer=answer,
        task=task,
        image=subject.path,
        source=subject.source,
        language=language,
        choices=choices,
        references=references,
        truth=_truth(subject) | dict(truth or {}),
    )


def _name(subject: Subject, split: str, language: str) -> Sample:
    return _sample(subject, split, "name", PROMPTS[language]["name"], subject.names[language], language=language)


def _group(subject: Subject, split: str, language: str) -> Sample:
    answer = subject.group if language == "en" else GROUP_NAMES_ZH[subject.group]
    return _sample(subject, split, "group", PROMPTS[language]["group"], answer, language=language)


def _caption(subject: Subject, split: str) -> Sample:
    phrase, kind = with_article(subject.names["en"]), subject.kind
    references = (f"a {kind} of {phrase}, {subject.group}", f"a {kind} of {phrase}", f"{phrase}, {subject.group}")
    return _sample(subject, split, "caption", PROMPTS["en"]["caption"], references[0], references=references)


def _exists(subject: Subject, other: Subject, split: str, k: int) -> Sample:
    right, wrong = subject.names["en"], other.names["en"]
    return _sample(
        subject,
        split,
        "exists",
        PROMPTS["en"]["exists"],
        right,
        suffix=f"/{k}",
        choices=(right, wrong),
        truth={"absent": wrong},
    )


def _yes_no(subject: Subject, asked: Subject, split: str, k: int) -> Sample:
    name, answer = asked.names["en"], "yes" if asked is subject else "no"
    prompt = PROMPTS["en"]["yes_no"].format(be=be(name).capitalize(), name=with_article(name))
    return _sample(
        subject,
        split,
        "yes_no",
        prompt,
        answer,
        suffix=f"/{k}/{answer}",
        choices=("yes", "no"),
        truth={"asked": name},
    )
