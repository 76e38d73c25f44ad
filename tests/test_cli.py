"""The command line: a mistake ends in one clear line and exit code 2, and help names every command."""

from __future__ import annotations

import sys

from fastmllm import cli


def _run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["fastmllm", *arguments])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    return code, out.out + out.err


def test_a_missing_recipe_names_its_neighbours(monkeypatch, capsys, tmp_path):
    (tmp_path / "emoji.yaml").write_text("name: a\n")
    code, text = _run(monkeypatch, capsys, "train", str(tmp_path / "emojis.yaml"))
    assert code == 2
    assert "no such file" in text
    assert "emoji.yaml" in text.replace("\n", "")
    assert "Traceback" not in text


def test_an_unknown_key_is_named(monkeypatch, capsys, tmp_path):
    (tmp_path / "r.yaml").write_text("name: a\nstages: [{name: s, steps: 1, trainable: {a: 1}}]\n")
    code, text = _run(monkeypatch, capsys, "data", str(tmp_path / "r.yaml"), "data.num_concept=3")
    assert code == 2
    assert "did you mean 'num_concepts'?" in text.replace("\n", " ")


def test_backends_are_reported(monkeypatch, capsys):
    code, text = _run(monkeypatch, capsys, "backends")
    assert code == 0
    for name in ("C++ operators", "triton", "flash-attn", "deepspeed"):
        assert name in text


def test_help_names_every_command(monkeypatch, capsys):
    code, text = _run(monkeypatch, capsys, "--help")
    assert code == 0
    assert all(name in text for name in cli.COMMANDS)
