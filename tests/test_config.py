"""Recipes: overrides, kinds, and messages that name the key and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pytest

from fastmllm.config import ConfigError, build, load_yaml


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    steps: int
    rate: float = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    stages: tuple[Inner, ...] = ()
    kind: Literal["pool", "merge"] = "pool"
    path: str | None = None
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.stages) > 2:
            raise ValueError("at most two stages")


def test_reads_overrides_and_scientific_notation(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("stages: [{steps: 3, rate: 1e-3}]\nweights: {name: 1}\n")
    tree = load_yaml(recipe, ["stages.0.steps=7", "kind=merge", "path=null", "weights.group=2e-1"])
    got = build(Outer, tree, "recipe")
    assert got == Outer(stages=(Inner(steps=7, rate=1e-3),), kind="merge", weights={"name": 1.0, "group": 0.2})


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"stagse": []}, r"recipe\.stagse: unknown key; did you mean 'stages'"),
        ({"stages": [{"rate": 1.0}]}, r"recipe\.stages\.0\.steps: missing"),
        ({"stages": [{"steps": "many"}]}, r"recipe\.stages\.0\.steps: expected int, found 'many'"),
        ({"stages": [{"steps": True}]}, r"expected int"),
        ({"kind": "prune"}, r"recipe\.kind: 'prune' is not one of 'pool', 'merge'"),
        ({"stages": [{"steps": 1}] * 3}, r"recipe: at most two stages"),
        ({"stages": {"steps": 1}}, r"expected a list"),
    ],
)
def test_says_what_is_wrong(tree, message):
    with pytest.raises(ConfigError, match=message):
        build(Outer, tree, "recipe")


def test_missing_recipe_names_its_neighbours(tmp_path):
    (tmp_path / "emoji.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"no such file; .*emoji\.yaml"):
        load_yaml(tmp_path / "emojis.yaml")


@pytest.mark.parametrize(
    "text, value",
    [
        ("/data/my #photos", "/data/my #photos"),
        ("~", "~"),
        ("~/photos", "~/photos"),
        ("a: b", "a: b"),
        ("*", "*"),
        ("@x", "@x"),
        ("", ""),
        ("0x_", "0x_"),
        ("2024-13-45", "2024-13-45"),
        ("null", None),
        ("24", 24),
        ("-0.5", -0.5),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ("{name: 4}", {"name": 4}),
        ("'24'", "24"),
        ('"[x] #1"', "[x] #1"),
    ],
)
def test_an_override_keeps_text_whole(tmp_path, text, value):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("path: null\n")
    got = load_yaml(recipe, [f"path={text}"])["path"]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize("text", ["[", "{a: 1", "'open", "[2024-13-45]", "{[1]: 2}", "[!!python/name:x.y ]"])
def test_an_override_that_is_no_yaml_is_named(tmp_path, text):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("path: null\n")
    with pytest.raises(ConfigError, match=r"override .data\.path=") as caught:
        load_yaml(recipe, [f"data.path={text}"])
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"a: [", b"a: 2024-13-45", b"\xff\xfe\xfa"])
def test_a_recipe_that_is_no_yaml_is_named(tmp_path, content):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"r\.yaml: not valid YAML"):
        load_yaml(tmp_path / "r.yaml")


@pytest.mark.parametrize("text", ["steps", "stages.5.steps=1", "stages.².steps=1", "kind.deep=1"])
def test_an_override_must_address_a_value(tmp_path, text):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("stages: [{steps: 3}]\nkind: pool\n")
    with pytest.raises(ConfigError, match="override"):
        load_yaml(recipe, [text])
