"""What takes long is said before it is over: a line without a terminal, a bar or a spinner on one."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from fastmllm.data import emoji_sources, progress


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_what_cannot_be_counted_is_said_first() -> None:
    console = Console(file=io.StringIO(), width=100)
    with progress.waiting("loading a model", console):
        assert text_of(console) == "loading a model ...\n"
    terminal = Console(file=io.StringIO(), width=100, force_terminal=True)
    with progress.waiting("loading a model", terminal):
        pass
    assert "loading a model" in text_of(terminal)


def test_what_can_be_counted_is_said_at_both_ends() -> None:
    console = Console(file=io.StringIO(), width=100)
    with progress.progress_bar(console, "sweeping") as advance:
        assert text_of(console) == "sweeping ...\n"
        advance(1, 2)
    assert text_of(console).splitlines()[1].startswith("sweeping: 0.")


def test_a_bar_appears_once_it_takes_long(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(range(3), "checking", 3)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "DELAY_S", -1.0)
    assert list(progress.track(range(3), "checking", 3)) == [0, 1, 2]
    assert "checking" in capsys.readouterr().err


def test_fetching_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(command: list[str], cwd: str, **_: object) -> subprocess.CompletedProcess[str]:
        assert "fetching @iconify-json/noto 1.2.9 with npm" in capsys.readouterr().err  # before, not after
        (Path(cwd) / "noto.tgz").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(emoji_sources.shutil, "which", lambda name: name)
    monkeypatch.setattr(emoji_sources.subprocess, "run", run)
    assert emoji_sources.fetch_npm("@iconify-json/noto", "1.2.9", tmp_path).is_file()
