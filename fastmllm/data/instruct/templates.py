"""Template files: phrasings of questions and answers in one language, with the words that say how to answer."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

SHIPPED = Path(__file__).parent / "wording"
# kind -> task -> the names that its phrasings may use
NAMES: dict[str, dict[str, frozenset[str]]] = {
    "vqa": {"ask": frozenset({"question", "answer"}), "choose": frozenset({"question", "options", "answer"})},
    "caption": {"describe": frozenset({"answer"})},
    "boxes": {
        "locate": frozenset({"label", "answer"}),
        "name": frozenset({"box", "answer"}),
        "count": frozenset({"label", "answer"}),
        "exists": frozenset({"label", "answer"}),
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Templates:
    """How one kind of set is put into words.

    Args:
        name: of the file, kept with every sample.
        kind: "vqa", "caption" or "boxes".
        language: "en", "zh": samples in it are put into these words.
        tasks: task -> (prompt, answer) phrasings with {names}; one is drawn a sample.
        formats: task, or vqa's "short", "number", "yes_no", -> prompts that say the form of the answer, one of which
            follows the question.
        words: "yes", "no", "option" (around a letter and a text) and others that answers are made of.
    """

    name: str
    kind: str
    language: str
    tasks: Mapping[str, tuple[tuple[str, str], ...]]
    formats: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)


def load_templates(name: str | Path) -> Templates:
    """Read a template file, or one that is shipped ("vqa_en", "vqa_zh", "caption_en", ...).

    Raises:
        ValueError: no such file, a kind or task that is not known, or a {name} that the task does not have.
    """
    path = SHIPPED / f"{name}.yaml" if not str(name).endswith((".yaml", ".yml")) else Path(name)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
        raise ValueError(f"templates {name}: {error.strerror}; give a .yaml file or one of {known}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: no YAML: {error}") from error
    if not isinstance(raw, dict) or raw.get("kind") not in NAMES or not isinstance(raw.get("language"), str):
        raise ValueError(f"{path}: needs a kind ({', '.join(NAMES)}), a language and tasks")
    if unknown := set(raw) - {"kind", "language", "tasks", "formats", "words"}:
        raise ValueError(f"{path}: unknown {sorted(unknown)}; the sections are kind, language, tasks, formats, words")
    tasks = {}
    for task, phrasings in (raw.get("tasks") or {}).items():
        if task not in NAMES[raw["kind"]]:
            raise ValueError(f"{path}: task {task!r} is none of {', '.join(NAMES[raw['kind']])}")
        tasks[task] = tuple(_phrasing(path, raw["kind"], task, item) for item in phrasings)
    if not tasks or not all(tasks.values()):
        raise ValueError(f"{path}: every task needs phrasings; tasks of {raw['kind']}: {', '.join(NAMES[raw['kind']])}")
    formats = {key: tuple(map(str, value)) for key, value in (raw.get("formats") or {}).items()}
    words = {str(key): str(value) for key, value in (raw.get("words") or {}).items()}
    needed = {"yes", "no"} if "exists" in tasks else {"option"} if "choose" in tasks else set()
    if missing := needed - set(words):
        raise ValueError(f"{path}: words lack {sorted(missing)}")
    return Templates(
        name=path.stem, kind=raw["kind"], language=raw["language"], tasks=tasks, formats=formats, words=words
    )


def _phrasing(path: Path, kind: str, task: str, item: Any) -> tuple[str, str]:
    prompt, answer = (item, "{answer}") if isinstance(item, str) else (item.get("prompt"), item.get("answer"))
    if not prompt or not answer:
        raise ValueError(f"{path}: a phrasing of {task} is a prompt, or has prompt and answer; got {item!r}")
    for text in (prompt, answer):
        used = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
        if wrong := used - NAMES[kind][task]:
            raise ValueError(f"{path}: {task}: {{{sorted(wrong)[0]}}} is none of {sorted(NAMES[kind][task])}")
    if "{answer}" not in answer:
        raise ValueError(f"{path}: {task}: the answer {answer!r} lacks {{answer}}")
    return prompt, answer
