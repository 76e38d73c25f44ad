from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastmllm.data.build import DataConfig, Splits, build, split_teams
from fastmllm.data.emoji import EmojiSet
from fastmllm.data.images import load_image
from fastmllm.data.sample import Sample


def config(cache: Path, **changes: object) -> DataConfig:
    base: dict[str, object] = {"cache": str(cache), "num_concepts": 8, "image_size": 32, "augment": 2}
    base |= {"train_scenes": 12, "eval_scenes": 8, "scene_concepts": 5}
    return DataConfig(**(base | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def splits(emoji_cache: Path) -> Splits:
    return build(config(emoji_cache))


def every(tasks: object) -> list[Sample]:
    return [sample for samples in tasks.values() for sample in samples]  # type: ignore[attr-defined]


def teams_of(sample: Sample) -> set[str]:
    return set(sample.source.split("+")) | {entry["source"] for entry in sample.truth.get("layout", ())}


@pytest.mark.parametrize("held_out", ["twemoji", "openmoji"])
def test_the_held_out_team_is_never_trained_on(emoji_cache: Path, held_out: str) -> None:
    splits = build(config(emoji_cache, held_out=held_out))
    assert (splits.unseen_team, splits.eval_team) == (True, held_out)
    for sample in every(splits.train):
        assert held_out not in teams_of(sample)
        assert held_out not in str(sample.image)
    for sample in every(splits.eval):
        assert teams_of(sample) == {held_out}
    trained = {load_image(s.image, None).numpy().tobytes() for s in every(splits.train) if s.image}
    tested = {load_image(s.image, None).numpy().tobytes() for s in every(splits.eval) if s.image}
    assert len(tested) > 8
    assert not trained & tested


def test_the_splits_hold_every_task(splits: Splits) -> None:
    tasks = {"name", "name_zh", "group", "group_zh", "caption", "exists", "yes_no"}
    tasks |= {"count", "position", "relation", "scene"}
    assert set(splits.train) == set(splits.eval) == tasks
    assert len(splits.train["name"]) == 8 * 3 * 3  # concepts, teams, the drawing and two variations
    assert len(splits.eval["name"]) == 8
    assert len(splits.eval["exists"]) == 8  # two concepts a group here: only one absent name each
    samples = every(splits.train) + every(splits.eval)
    assert len({sample.id for sample in samples}) == len(samples)
    assert {sample.answer for sample in splits.eval["name"]} == set(splits.concepts)
    assert {sample.answer for sample in splits.eval["group"]} == set(splits.groups)
    assert {"noto", "fluent", "openmoji", "twemoji", "names"} == set(splits.licences)
    assert splits.notes == ()


def test_the_same_recipe_gives_the_same_samples(splits: Splits, emoji_cache: Path) -> None:
    assert build(config(emoji_cache)) == splits
    assert build(config(emoji_cache, seed=1)).concepts != splits.concepts


def limit_teams(monkeypatch: pytest.MonkeyPatch, *teams: str) -> None:
    from fastmllm.data import build as room
    from fastmllm.data.emoji import prepare_emoji

    def some(cache: Path, *, size: int) -> EmojiSet:
        full = prepare_emoji(cache, size=size)
        return replace(
            full,
            concepts=tuple(replace(c, drawings={team: c.drawings[team] for team in teams}) for c in full.concepts),
            teams={team: full.teams[team] for team in teams},
            notes=(),
        )

    monkeypatch.setattr(room, "prepare_emoji", some)


def test_with_one_team_the_test_drawings_are_transformed_and_the_notes_say_so(
    emoji_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_teams(monkeypatch, "noto")
    splits = build(config(emoji_cache))
    assert (splits.unseen_team, splits.eval_team) == (False, "noto")
    assert {s.source for s in splits.train["name"]} == {"noto"}
    assert any("no unseen team available" in note for note in splits.notes)
    assert not {s.image for s in every(splits.train)} & {s.image for s in every(splits.eval)}


def test_the_team_really_tested_on_is_named_where_the_one_asked_for_is_absent(
    emoji_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_teams(monkeypatch, "noto", "openmoji")
    splits = build(config(emoji_cache, held_out="twemoji"))
    assert (splits.unseen_team, splits.eval_team) == (True, "openmoji")
    assert {s.source for s in splits.eval["name"]} == {"openmoji"}
    assert any("held_out=twemoji is not available" in note for note in splits.notes)


def test_who_is_held_out() -> None:
    notes: list[str] = []
    assert split_teams(("noto", "fluent", "twemoji"), "fluent", notes) == (("noto", "twemoji"), "fluent", True)
    assert notes == []
    assert split_teams(("noto", "openmoji"), "twemoji", notes) == (("noto",), "openmoji", True)
    assert "held_out=twemoji is not available: tested on openmoji" in notes[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "web"}, "data.source must be one of"),
        ({"source": "folder"}, "needs data.path"),
        ({"source": "emoji", "path": "x"}, "data.path is for photographs"),
        ({"held_out": "apple"}, "data.held_out must be one of"),
        ({"languages": ("en", "xx")}, "data.languages must be some of"),
        ({"num_concepts": 1}, "data.num_concepts must be at least 2"),
        ({"augment": -1}, "data.augment must be at least 0"),
        ({"scene_grid": 4}, "data.scene_grid must be 2 or 3"),
        ({"eval_share": 1.0}, "data.eval_share must be between"),
        ({"max_train_per_class": 0}, "data.max_train_per_class must be at least 1"),
    ],
)
def test_a_bad_recipe_is_rejected_before_anything_is_fetched(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_more_concepts_than_there_are(emoji_cache: Path) -> None:
    with pytest.raises(ValueError, match="from 2 to 16"):
        build(config(emoji_cache, num_concepts=99))


def test_contrasts_ask_about_hallucination_by_the_held_out_team(emoji_cache: Path, splits: Splits) -> None:
    made = build(config(emoji_cache, contrasts=1, train_scenes=40))
    added = {task: made.eval[task] for task in made.eval if task not in splits.eval}
    stems = ("hallucination", "hallucination_choice", "hallucination_caption")
    assert set(added) == {*stems, *(f"{stem}_zh" for stem in stems)}
    assert {s.truth["kind"] for s in added["hallucination"]} >= {"existence, popular", "existence, adversarial"}
    assert all(teams_of(s) == {"twemoji"} for s in every(added))
    assert set(made.train) == set(splits.train)  # nothing of it is trained on
    assert made.eval == build(config(emoji_cache, contrasts=1, train_scenes=40)).eval
