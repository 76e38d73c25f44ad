"""From a recipe's data section to training and evaluation samples."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastmllm.data.augment import VERSION as AUGMENT_VERSION
from fastmllm.data.augment import rng_of, transformed, variants
from fastmllm.data.cache import cache_dir
from fastmllm.data.canvas import habits_of
from fastmllm.data.emoji import Concept, EmojiSet, prepare_emoji, render_drawings, select_concepts
from fastmllm.data.emoji_sources import LABEL_LANGUAGES, TEAMS
from fastmllm.data.folder import read_folder
from fastmllm.data.hallucination import hallucination_set
from fastmllm.data.progress import track
from fastmllm.data.sample import Sample
from fastmllm.data.scenes import scene_samples, scenes
from fastmllm.data.tasks import Subject, ask

SCENE_TASKS = ("count", "scene")  # every scene is asked one of them
SOURCES = ("auto", "emoji", "folder")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What to learn from and what to test on.

    Args:
        source: emoji | folder | auto (folder where `path` is set, else emoji).
        path: folder or .tar of photographs, one folder a class; or a folder that holds nothing but one such .tar.
        num_concepts: emoji concepts (321 are picturable with all four teams).
        held_out: design team whose drawings are only tested on.
        languages: of names and groups (emoji only).
        image_size: side of rendered drawings and scenes in pixels.
        seed: of every choice.
        augment: light variations of each training drawing, beside itself.
        eval_negatives: forced choices, and pairs of yes/no questions, for each evaluation image.
        train_scenes, eval_scenes: composed scenes; 0 = none.
        scene_concepts: how many of the concepts appear in scenes; fewer are learned sooner.
        scene_grid: cells on a scene's side, 2 or 3.
        contrasts: pairs of scenes for each of the nine kinds of questions about hallucination, in all `languages`
            (`fastmllm.data.hallucination`); 0 = none.
        eval_share: share of a class that is held out where a folder has no split of its own.
        max_train_per_class, max_eval_per_class: photographs used of each class; None = all.
        cache: asset folder; None = `cache_dir()`.
    """

    source: str = "auto"
    path: str | None = None
    num_concepts: int = 100
    held_out: str = "twemoji"
    languages: tuple[str, ...] = ("en", "zh")
    image_size: int = 224
    seed: int = 0
    augment: int = 4
    eval_negatives: int = 3
    train_scenes: int = 400
    eval_scenes: int = 120
    scene_concepts: int = 30
    scene_grid: int = 2
    contrasts: int = 0
    eval_share: float = 0.2
    max_train_per_class: int | None = None
    max_eval_per_class: int | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"data.source must be one of {SOURCES}, got {self.source!r}")
        if self.source == "folder" and not self.path:
            raise ValueError("data.source=folder needs data.path, a folder or .tar with one folder a class")
        if self.source == "emoji" and self.path:
            raise ValueError("data.path is for photographs; set data.source=folder, or leave data.path out")
        if self.held_out not in TEAMS:
            raise ValueError(f"data.held_out must be one of {TEAMS}, got {self.held_out!r}")
        if not self.languages or set(self.languages) - set(LABEL_LANGUAGES):
            raise ValueError(f"data.languages must be some of {LABEL_LANGUAGES}, got {self.languages!r}")
        least = {"num_concepts": 2, "image_size": 8, "augment": 0, "eval_negatives": 1, "train_scenes": 0}
        least |= {"eval_scenes": 0, "scene_concepts": 4, "contrasts": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"data.{name} must be at least {low}, got {getattr(self, name)}")
        for name in ("max_train_per_class", "max_eval_per_class"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name} must be at least 1, got {value}")
        if self.scene_grid not in (2, 3):
            raise ValueError(f"data.scene_grid must be 2 or 3, got {self.scene_grid}")
        if not 0.0 < self.eval_share < 1.0:
            raise ValueError(f"data.eval_share must be between 0 and 1, got {self.eval_share}")

    @property
    def photographs(self) -> bool:
        """Tell whether a folder is read, and not the emoji."""
        return self.source == "folder" or (self.source == "auto" and bool(self.path))


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """Samples by task, and what there is to say about them.

    Args:
        train, eval: task -> samples ("name", "name_zh", "group", "caption", "exists", "yes_no", "count", ...).
        concepts: English names of the closed set.
        groups: the kinds of thing; empty for photographs.
        licences: source -> licence.
        notes: missing sources, and what that means for the figures.
        skipped: reason -> count.
        unseen_team: whether the evaluation drawings are by a team that no training drawing is by.
        eval_team: team of the evaluation drawings, which is `DataConfig.held_out` only where that one is available.
            With `unseen_team` false it is the training team, its drawings transformed; "" = photographs.
    """

    train: Mapping[str, list[Sample]]
    eval: Mapping[str, list[Sample]]
    concepts: tuple[str, ...]
    groups: tuple[str, ...]
    licences: Mapping[str, str]
    notes: tuple[str, ...]
    skipped: Counter[str]
    unseen_team: bool
    eval_team: str = ""


def build(config: DataConfig) -> Splits:
    """Build the samples of a recipe; everything fetched or drawn is kept in the cache.

    Args:
        config: what to build.

    Returns:
        The splits. The same config on the same sources gives the same samples.

    Raises:
        ValueError: more concepts than there are, or a folder without usable classes.
        SourceError: no drawings or no names from any source.
    """
    cache = Path(config.cache).expanduser() if config.cache else cache_dir()
    if config.photographs:
        return _build_folder(config, cache)
    return _build_emoji(config, cache)


def _build_folder(config: DataConfig, cache: Path) -> Splits:
    assert config.path is not None  # checked by DataConfig
    photos = read_folder(config.path, cache=cache, eval_share=config.eval_share, seed=config.seed)

    def subjects(classes: Mapping[str, Sequence[Path]], split: str, most: int | None) -> list[Subject]:
        found = []
        for name, files in classes.items():
            order = rng_of("photos", config.seed, split, name).permutation(len(files))[:most]
            for i in sorted(order):
                key = f"{name}/{files[i].name}"
                names = {"en": name}
                found.append(
                    Subject(
                        key=key, path=str(files[i]), concept=name, source=split, group="", names=names, kind="photo"
                    )
                )
        return found

    train = subjects(photos.train, "train", config.max_train_per_class)
    held = subjects(photos.eval, "validation", config.max_eval_per_class)
    return Splits(
        train=ask(train, split="train", seed=config.seed),
        eval=ask(held, split="eval", num_negatives=config.eval_negatives, seed=config.seed),
        concepts=photos.classes,
        groups=(),
        licences={"photographs": f"as stated by their owner: {config.path}"},
        notes=photos.notes,
        skipped=photos.skipped,
        unseen_team=False,
    )


def _build_emoji(config: DataConfig, cache: Path) -> Splits:
    emoji = prepare_emoji(cache, size=config.image_size)
    concepts = select_concepts(emoji, config.num_concepts, config.seed)
    render_drawings(emoji, concepts)
    notes = list(emoji.notes)
    train_teams, eval_team, unseen = split_teams(tuple(emoji.teams), config.held_out, notes)
    root = cache / "emoji"
    train = _train_subjects(emoji, concepts, train_teams, root / f"variants-{emoji.size}", config)
    held = _eval_subjects(emoji, concepts, eval_team, unseen, root / f"variants-{emoji.size}", config)
    result_train = ask(train, split="train", languages=config.languages, seed=config.seed)
    result_eval = ask(
        held, split="eval", languages=config.languages, num_negatives=config.eval_negatives, seed=config.seed
    )
    count = min(config.scene_concepts, len(concepts))
    picked = {concepts[i].codepoint for i in rng_of("scene concepts", config.seed).permutation(len(concepts))[:count]}
    for split, num, pool, result in (
        ("train", config.train_scenes, train, result_train),
        ("eval", config.eval_scenes, held, result_eval),
    ):
        if num:
            _add_scenes(result, [s for s in pool if s.concept in picked], split, num, root, config)
    if config.contrasts:
        made, remarks = hallucination_set(
            held, pool=lambda s: s.concept in picked, languages=config.languages, num=config.contrasts, split="eval",
            seed=config.seed, habits=habits_of(s for task in SCENE_TASKS for s in result_train.get(task, ())),
            folder=root / f"scenes-{config.image_size}", key=_drawings_key(held), grid=config.scene_grid,
            size=config.image_size,
        )  # fmt: skip
        result_eval |= made
        notes += remarks
    return Splits(
        train=result_train,
        eval=result_eval,
        concepts=tuple(concept.name_en for concept in concepts),
        groups=tuple(sorted({concept.group for concept in concepts})),
        licences=emoji.licences,
        notes=tuple(notes),
        skipped=Counter(),
        unseen_team=unseen,
        eval_team=eval_team,
    )


def split_teams(teams: Sequence[str], held_out: str, notes: list[str]) -> tuple[tuple[str, ...], str, bool]:
    """Decide who is trained on and who is tested on; what is not as asked goes to `notes`.

    Returns:
        Training teams, evaluation team, whether the evaluation team is unseen.
    """
    if len(teams) == 1:
        notes.append(
            f"no unseen team available: figures are on the training team ({teams[0]}), transformed "
            "(mirrored, turned and tinted)"
        )
        return (teams[0],), teams[0], False
    if held_out not in teams:
        instead = teams[-1]
        notes.append(f"held_out={held_out} is not available: tested on {instead} instead, which is not trained on")
        held_out = instead
    return tuple(team for team in teams if team != held_out), held_out, True


def _subject(concept: Concept, team: str, key: str, path: Path) -> Subject:
    names = {"en": concept.name_en} | ({"zh": concept.name_zh} if concept.name_zh else {})
    return Subject(key=key, path=str(path), concept=concept.codepoint, source=team, group=concept.group, names=names)


def _train_subjects(
    emoji: EmojiSet, concepts: Sequence[Concept], teams: Sequence[str], root: Path, config: DataConfig
) -> list[Subject]:
    jobs = [(concept, team) for concept in concepts for team in teams]
    made = []
    for concept, team in track(jobs, "varying training drawings", len(jobs)):
        paths = variants(
            concept.drawings[team],
            name=concept.codepoint,
            folder=root / f"{team}-{emoji.teams[team].version}",
            num=config.augment,
            seed=config.seed,
        )
        made += [_subject(concept, team, f"{team}/{concept.codepoint}-{i}", path) for i, path in enumerate(paths)]
    return made


def _eval_subjects(
    emoji: EmojiSet, concepts: Sequence[Concept], team: str, unseen: bool, root: Path, config: DataConfig
) -> list[Subject]:
    made = []
    for concept in concepts:
        path = concept.drawings[team]
        if not unseen:
            folder = root / f"{team}-{emoji.teams[team].version}"
            path = transformed(path, name=concept.codepoint, folder=folder)
        made.append(_subject(concept, team, f"{team}/{concept.codepoint}", path))
    return made


def _drawings_key(pool: Sequence[Subject]) -> str:
    text = "|".join([str(AUGMENT_VERSION), *(Path(s.path).parent.name + "/" + Path(s.path).name for s in pool)])
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _add_scenes(
    tasks: dict[str, list[Sample]], pool: Sequence[Subject], split: str, num: int, root: Path, config: DataConfig
) -> None:
    key = f"{_drawings_key(pool)}-g{config.scene_grid}-s{config.seed}"
    made = scenes(
        pool,
        num=num,
        split=split,
        seed=config.seed,
        folder=root / f"scenes-{config.image_size}",
        key=key,
        grid=config.scene_grid,
        size=config.image_size,
    )
    for scene, path in made:
        for sample in scene_samples(scene, path, split=split, seed=config.seed):
            tasks.setdefault(sample.task, []).append(sample)
