"""Each published method is a line that builds and runs; docs/compression.md shows them all, and its code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from visual_tokens import pictures

from fastmllm.compression import METHODS, Placement, make
from fastmllm.compression.budget import tokens_to_keep
from fastmllm.compression.published import PUBLISHED, placement, table

PAGE = (Path(__file__).parents[2] / "docs" / "compression.md").read_text(encoding="utf-8")


def stages(line) -> tuple:
    return line["keep"] if isinstance(line["keep"], tuple) else (line["keep"],)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_line_builds_and_says_where_it_stands(name):
    line = PUBLISHED[name]
    assert line.keys() == {"method", "keep", "options", "at", "paper"}
    place = re.fullmatch(r"vision|connector|language:(\d+(?:/\d+)*)", line["at"])
    assert place
    assert len(stages(line)) == len((place[1] or "1").split("/"))
    assert line["paper"] is None or re.fullmatch(r"\d{4}\.\d{5}", line["paper"])
    fewest = [tokens_to_keep(name, keep, (576,))[0] for keep in stages(line)]
    assert fewest == sorted(fewest, reverse=True)
    with torch.device("meta"):
        for keep in stages(line):
            assert make(line["method"], keep, **line["options"]).name == line["method"]


@pytest.mark.parametrize("name", [n for n, line in PUBLISHED.items() if "width" not in line["options"]])
def test_a_line_without_weights_runs(name):
    line = PUBLISHED[name]
    tokens, evidence = pictures(((4, 4, 4), (4, 4, 2)))  # videos, which each method takes
    compressor = make(line["method"], 0.25 if line["method"] == "pixel_shuffle" else 0.5, **line["options"])
    out, _ = compressor(tokens, evidence)
    assert out.seqlens == tokens_to_keep(name, compressor.keep, tokens.seqlens)


def test_every_method_is_published():
    assert {line["method"] for line in PUBLISHED.values()} == set(METHODS)


def test_the_page_shows_the_table():
    assert f"\n{table()}\n" in PAGE, "docs/compression.md: paste what fastmllm.compression.published.table() returns"


def test_the_page_names_each_method():
    for name, kind in METHODS.items():
        assert f"`{name}`" in PAGE
        if kind.faithful_to is not None:
            assert re.search(rf"^\| `{name}` \|", PAGE, re.MULTILINE), f"{name}: say what its faithful mode is"


@pytest.mark.parametrize("index", range(PAGE.count("```python")))
def test_the_code_of_the_page_runs(index, capsys):
    code = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[index]
    exec(code, {})
    printed = capsys.readouterr().out.splitlines()
    assert printed == re.findall(r"print\(.*\)  # (.*)", code)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_line_has_its_place(name):
    line = PUBLISHED[name]
    if line["method"] == "conv_reduce" and line["at"] == "vision":
        with pytest.raises(ValueError, match="inside of the encoder tokens merge"):
            placement(name)  # DeepSeek-OCR's convolutions stand between two encoders, which is a model of its own
        return
    with torch.device("meta"):
        placed = placement(name)
    assert (placed.merge is not None) == (line["at"] == "vision")
    assert (placed.connector is not None) == (line["at"] == "connector")
    assert [layer for layer, _ in placed.stages] == [int(n) for n in re.findall(r"\d+", line["at"])]


def test_several_layers_share_what_came_in_at_the_first():
    assert [c.keep for _, c in placement("PyramidDrop").stages] == [0.5, 0.25, 0.125]
    assert [c.keep for _, c in placement("SparseVLM").stages] == [300, 200, 110]
    assert placement("DivPrune", keep=32).connector.keep == 32
    with pytest.raises(ValueError, match="needs 3 budgets"):
        placement("PyramidDrop", keep=0.5)
    with pytest.raises(ValueError, match="bipartite_merge without options"):
        Placement.of("vision", METHODS["bipartite_merge"], 4, metric="features")
    with pytest.raises(ValueError, match="in front of layer 0 there is none"):
        Placement.of("language:0", METHODS["topk"], 4, scorer="last_row")
    with pytest.raises(ValueError, match="unknown method 'Best'"):
        placement("Best")
    with pytest.raises(ValueError, match="'decoder' is no place"):
        Placement.of("decoder", METHODS["topk"], 4)
