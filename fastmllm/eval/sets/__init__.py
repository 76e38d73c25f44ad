"""Published sets in their authors' formats, as tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fastmllm.eval.sets.amber import load_amber
from fastmllm.eval.sets.choices import load_science_qa
from fastmllm.eval.sets.flickr import load_flickr30k
from fastmllm.eval.sets.nlvr import load_nlvr
from fastmllm.eval.sets.pope import load_pope
from fastmllm.eval.sets.reading import Loaded, SetError
from fastmllm.eval.sets.short_answers import load_easy_vqa, load_gqa, load_textvqa, load_vqav2

LOADERS: dict[str, Callable[[str | Path, bool], Loaded]] = {
    "pope": load_pope,
    "amber": load_amber,
    "nlvr": load_nlvr,
    "easy-vqa": load_easy_vqa,
    "scienceqa": load_science_qa,
    "vqav2": load_vqav2,
    "gqa": load_gqa,
    "textvqa": load_textvqa,
    "flickr30k": load_flickr30k,
}

__all__ = ["LOADERS", "Loaded", "SetError", "describe", "load_sets"]


def load_sets(folders: Mapping[str, str | Path], images: bool = True) -> list[Loaded]:
    """Load sets by name from their folders.

    Args:
        folders: name -> folder.
        images: see `reading.Reader`.

    Raises:
        SetError: an unknown name, or a set that is not there; the message says what to put where.
    """
    if unknown := [name for name in folders if name not in LOADERS]:
        raise SetError(f"eval.sets: {unknown[0]!r} is unknown; known: {', '.join(LOADERS)}")
    return [LOADERS[name](folder, images) for name, folder in folders.items()]


def describe(loaded: Loaded) -> list[str]:
    """Return lines that say what of a set is there, and what was left out and why."""
    asked = sum(len(task.documents) for task in loaded.tasks)
    lines = [f"{loaded.name}: {asked} questions in {len(loaded.tasks)} task(s)", *loaded.notes]
    lines += [f"{loaded.name}: skipped {count}: {reason}" for reason, count in loaded.skipped.most_common()]
    lines += [f"  {line}" for line in loaded.listed[:5]]
    hidden = sum(loaded.skipped.values()) - 5
    return [*lines, f"  … and {hidden} more"] if hidden > 0 else lines
