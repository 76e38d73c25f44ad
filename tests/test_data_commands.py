"""`fastmllm data ...` from a shell's words to files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_shards import scene, write_tar
from tiny_vlm import tiny_vlm

from fastmllm import cli
from fastmllm.data_commands import COMMANDS
from fastmllm.infer.respond import Responder
from fastmllm.named import imported


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fastmllm", "data", *map(str, words)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTMLLM_CACHE", str(tmp_path / "cache"))
    sizes = [(40, 40), (10, 40), (40, 40), (40, 40)]
    members = [[(f"{i}.png", scene(i % 3, size)), (f"{i}.txt", b"a red barn")] for i, size in enumerate(sizes)]
    return write_tar(tmp_path / "a.tar", [member for sample in members for member in sample])


def test_filter_then_reshard(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    out = tmp_path / "chosen"
    assert call(monkeypatch, "filter", shards, "--out", out, "--min-side", 20, "--exact", "image") == 0
    assert [json.loads(line)["key"] for line in (out / "kept.jsonl").read_text().splitlines()] == ["0", "2"]
    assert "exact duplicate (image)" in capsys.readouterr().out
    assert "image too small" in (out / "report.html").read_text()
    to = tmp_path / "new"
    assert call(monkeypatch, "reshard", shards, "--kept", out / "kept.jsonl", "--to", to) == 0
    assert "2 samples in 1 shards" in capsys.readouterr().out
    assert (to / "000000.tar").is_file()


def test_scores_come_from_a_callable_by_name(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_scorer.py").write_text("def score(images, texts):\n    return [float(len(i)) for i in images]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["filter", shards, "--out", tmp_path / "o", "--scorer", "my_scorer:score", "--top-fraction", 0.5]
    assert call(monkeypatch, *words) == 0
    assert json.loads((tmp_path / "o" / "summary.json").read_text())["kept"] == 2


def test_adapt_writes_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    box = {"image": "a.png", "width": 10, "height": 10, "boxes": [{"label": "dog", "box": [1, 1, 5, 5]}]}
    (tmp_path / "set.json").write_text(json.dumps([box, {"image": "b.png"}]))
    assert call(monkeypatch, "adapt", tmp_path / "set.json", "--kind", "boxes", "--to", tmp_path / "out.jsonl") == 0
    assert "1 left out: wrong columns" in capsys.readouterr().out
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3


def test_self_instruct_asks_a_callable_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_llm.py").write_text(
        "def chat(messages):\n    return 'Question: Which animal?\\n===\\nAnswer: A dog.'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "set.jsonl").write_text(json.dumps({"image": "a.png", "caption": "A dog."}))
    words = [
        "self-instruct",
        tmp_path / "set.jsonl",
        "--llm",
        "my_llm:chat",
        "--model",
        "m",
        "--to",
        tmp_path / "o.jsonl",
    ]
    assert call(monkeypatch, *words) == 0
    made = json.loads((tmp_path / "o.jsonl").read_text())
    assert made["conversations"][1]["value"] == "A dog."


def test_clean_lists_findings(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "l.jsonl").write_text(json.dumps({"shard": str(shards), "key": "0", "loss": 3.0, "blind": 1.0}))
    assert call(monkeypatch, "clean", shards, "--out", tmp_path / "c", "--losses", tmp_path / "l.jsonl") == 0
    assert "3 of 4 samples without a finding" in capsys.readouterr().out
    assert json.loads((tmp_path / "c" / "findings.jsonl").read_text())["reason"] == "image does not fit"


def test_shares_of_a_stage_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "shares.jsonl").write_text(
        json.dumps({"micro_batch": 0, "sources": {"a": [1, 30, 4], "b": [2, 10, 5]}})
    )
    assert call(monkeypatch, "shares", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "75.0%" in shown
    assert "5.0" in shown


class _Finished:
    """What the tools need of a finished run."""

    def __init__(self, recipe, out) -> None:
        self.recipe = SimpleNamespace(name="toy")

    def responder(self) -> Responder:
        return Responder(tiny_vlm(0))

    def weight_digests(self) -> list[str]:
        return ["0123456789abcdef"]


def test_a_run_s_model_captions_and_scores(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmllm.session.Session", _Finished)
    monkeypatch.setattr("fastmllm.recipe.Recipe.load", lambda recipe, overrides: None)
    words = [shards, "--recipe", "r.yaml", "--to"]
    assert call(monkeypatch, "recaption", *words, tmp_path / "c.jsonl", "--max-new-tokens", 3) == 0
    lines = (tmp_path / "c.jsonl").read_text() + (tmp_path / "c.skipped.jsonl").read_text()
    assert len(lines.splitlines()) == 4
    assert all(json.loads(line)["key"] for line in lines.splitlines())
    assert call(monkeypatch, "losses", *words, tmp_path / "l.jsonl") == 0
    assert set(json.loads((tmp_path / "l.jsonl").read_text().splitlines()[0])) == {"shard", "key", "loss", "blind"}


def test_mistakes_are_one_line(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert call(monkeypatch, "filter", shards, "--out", tmp_path / "o", "--top-fraction", 2) == 2
    assert call(monkeypatch, "filter", shards, "--out", tmp_path / "o", "--min-score", 0.2) == 2
    assert "measure with a scorer" in capsys.readouterr().err
    with pytest.raises(ValueError, match="module:callable"):
        imported("no_such_module:x")
    with pytest.raises(ValueError, match="nothing to call"):
        imported("sys:path")


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert call(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
