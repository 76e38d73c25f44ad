"""The emoji data set: concepts with CLDR names, each drawn by several design teams."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastmllm.data.cache import atomic_path, cache_dir
from fastmllm.data.emoji_groups import group_by_codepoint
from fastmllm.data.emoji_sources import (
    LABELS_PACKAGE,
    TEAMS,
    Names,
    SourceError,
    Team,
    debian_noto,
    npm_names,
    npm_team,
    openmoji_wheel,
    wheel_names,
)
from fastmllm.data.progress import track

SHORT_NAME = re.compile(r"[a-z-]+( [a-z-]+)?")  # one or two lower-case words


@dataclass(frozen=True, kw_only=True, slots=True)
class Concept:
    """One emoji.

    Args:
        codepoint: hexadecimal, lower case, without variation selector.
        name_en: CLDR short name.
        name_zh: the same in Chinese; empty where the source has none.
        group: what kind of thing it is; empty unless it is a picturable thing (emoji_groups.py).
        drawings: team -> PNG; the file exists after `render_drawings`.
    """

    codepoint: str
    name_en: str
    name_zh: str
    group: str
    drawings: Mapping[str, Path]


@dataclass(frozen=True, kw_only=True, slots=True)
class EmojiSet:
    """What this machine has.

    Args:
        concepts: in the order of their code points.
        teams: the design teams that are here, in the order of `TEAMS`.
        licences: source -> licence and package.
        notes: sources that are missing, and what took their place.
        size: side of the drawings in pixels.
    """

    concepts: tuple[Concept, ...]
    teams: Mapping[str, Team]
    licences: Mapping[str, str]
    notes: tuple[str, ...]
    size: int


def prepare_emoji(cache: Path | None = None, *, size: int = 224) -> EmojiSet:
    """Fetch the drawings' packages and the names, or open them where they are already cached.

    Args:
        cache: asset folder; None = `cache_dir()`.
        size: side of the drawings in pixels.

    Returns:
        The set, with a note for each source that this machine lacks. Nothing is rendered yet.

    Raises:
        SourceError: no drawings, or no names, from any source.
    """
    if size < 1:
        raise ValueError(f"prepare_emoji: size must be at least 1 pixel, got {size}")
    root = (cache or cache_dir()) / "emoji"
    notes: list[str] = []
    teams = {name: team for name in TEAMS if (team := _open_team(name, root, notes)) is not None}
    if not teams:
        raise SourceError("no emoji drawings: " + "; ".join(notes))
    names, label_licence = _open_names(root, notes)
    groups = group_by_codepoint()
    concepts = tuple(
        Concept(
            codepoint=code,
            name_en=name["en"],
            name_zh=name.get("zh", ""),
            group=groups.get(code, ""),
            drawings={
                team.name: root / f"drawings-{size}" / f"{team.name}-{team.version}" / f"{code}.png"
                for team in teams.values()
                if code in team.codepoints
            },
        )
        for code, name in sorted(names.items())
        if "en" in name and any(code in team.codepoints for team in teams.values())
    )
    licences = {name: team.licence for name, team in teams.items()} | {"names": label_licence}
    return EmojiSet(concepts=concepts, teams=teams, licences=licences, notes=tuple(notes), size=size)


def _open_team(name: str, root: Path, notes: list[str]) -> Team | None:
    try:
        return npm_team(name, root)
    except SourceError as error:
        reason = str(error)
    fallback = {"openmoji": openmoji_wheel, "noto": lambda: debian_noto(root)}.get(name)
    if fallback is not None:
        try:
            team = fallback()
        except SourceError as error:
            reason += f"; {error}"
        else:
            notes.append(f"{name}: {reason}; drawings taken instead from {team.licence}")
            return team
    notes.append(f"{name}: {reason}; left out")
    return None


def _open_names(root: Path, notes: list[str]) -> tuple[Names, str]:
    package, version, licence = LABELS_PACKAGE
    try:
        return npm_names(root), f"{licence}, npm package {package} {version}"
    except SourceError as error:
        reason = str(error)
    try:
        names = wheel_names()
    except SourceError as error:
        raise SourceError(f"no emoji names: {reason}; {error}") from error
    notes.append(f"names: {reason}; taken instead from the Python package emoji")
    return names, "BSD-3-Clause (names: Unicode CLDR, Unicode License v3), Python package emoji"


def render_drawings(emoji: EmojiSet, concepts: Iterable[Concept] | None = None) -> int:
    """Render the drawings that are not in the cache yet.

    Args:
        emoji: what to render from.
        concepts: which of them; None = all.

    Returns:
        Number of files written.
    """
    jobs = [
        (emoji.teams[name], concept.codepoint, path)
        for concept in (emoji.concepts if concepts is None else concepts)
        for name, path in concept.drawings.items()
        if not path.exists()
    ]
    for team, codepoint, path in track(jobs, "rendering emoji drawings", len(jobs)):
        with atomic_path(path) as temporary:
            temporary.write_bytes(team.draw(codepoint, emoji.size))
    return len(jobs)


def picturable(emoji: EmojiSet) -> list[Concept]:
    """Return the concepts that can be named from their drawing: see emoji_groups.py for the rule.

    Each is drawn by every team here and has a name of one or two words, unique in English and in Chinese.
    """
    pool = [
        concept
        for concept in emoji.concepts
        if concept.group and SHORT_NAME.fullmatch(concept.name_en) and set(concept.drawings) == set(emoji.teams)
    ]
    english = Counter(concept.name_en for concept in pool)
    chinese = Counter(concept.name_zh for concept in pool if concept.name_zh)
    return [c for c in pool if english[c.name_en] == 1 and chinese[c.name_zh] <= 1]


def select_concepts(emoji: EmojiSet, num: int, seed: int) -> list[Concept]:
    """Choose concrete things, balanced over their groups.

    A pure function: the groups are shuffled inside by the seed and dealt from in turn, so that the sizes of two
    groups differ by one at most, as long as the smaller one lasts.

    Args:
        emoji: the set to choose from.
        num: how many concepts.
        seed: which ones.

    Returns:
        `num` concepts, in the order of their code points.

    Raises:
        ValueError: num < 2, or more than there are.
    """
    pool = picturable(emoji)
    if not 2 <= num <= len(pool):
        raise ValueError(f"select_concepts: num must be from 2 to {len(pool)} (what the sources here hold), got {num}")
    generator = np.random.default_rng(seed)
    groups: dict[str, list[Concept]] = {}
    for concept in pool:
        groups.setdefault(concept.group, []).append(concept)
    decks = [[members[i] for i in generator.permutation(len(members))] for _, members in sorted(groups.items())]
    order = generator.permutation(len(decks))
    chosen: list[Concept] = []
    for turn in range(max(len(deck) for deck in decks)):
        chosen += [decks[i][turn] for i in order if turn < len(decks[i])]
    return sorted(chosen[:num], key=lambda concept: (len(concept.codepoint), concept.codepoint))
