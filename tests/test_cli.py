"""The command line: a mistake ends in one clear line and exit code 2, and help names every command."""

from __future__ import annotations

import errno
import inspect
import os
import subprocess
import sys

import pytest

from fastmllm import cli
from fastmllm.data.emoji_sources import SourceError
from fastmllm.train.checkpoint import CheckpointError
from fastmllm.train.trainer import NonFiniteLossError


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


def _failing(monkeypatch, error):
    def command() -> None:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "backends", command)


class _Stopped(SystemExit):
    """As a run that was saved and ended by a signal."""


@pytest.mark.parametrize(
    "error, line",
    [
        (CheckpointError("step-3: damaged"), "error: step-3: damaged"),
        (SourceError("no emoji drawings"), "error: no emoji drawings"),
        (NonFiniteLossError("step 7: loss is nan;\n  lower the rate"), "error: step 7: loss is nan; lower the rate"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), "No space left on device: 'out/x'"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "Permission denied: 'out'"),
        (ValueError(), "error: ValueError"),
    ],
)
def test_what_went_wrong_is_one_line(monkeypatch, capsys, error, line):
    _failing(monkeypatch, error)
    code, text = _run(monkeypatch, capsys, "backends")
    assert code == 2
    assert line in text
    assert text.count("\n") == 1


@pytest.mark.parametrize("kind", [TypeError, AssertionError, AttributeError, KeyError, NotImplementedError])
def test_a_programming_error_keeps_its_traceback(monkeypatch, capsys, kind):
    _failing(monkeypatch, kind("bug"))
    with pytest.raises(kind):
        _run(monkeypatch, capsys, "backends")


def test_control_c_is_one_line(monkeypatch, capsys):
    _failing(monkeypatch, KeyboardInterrupt())
    assert _run(monkeypatch, capsys, "backends") == (130, "interrupted\n")


def test_an_exit_of_the_command_passes(monkeypatch, capsys):
    _failing(monkeypatch, _Stopped(143))
    assert _run(monkeypatch, capsys, "backends") == (143, "")


def test_bad_yaml_in_a_recipe_or_an_override_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "r.yaml").write_text("name: [a\n")
    code, text = _run(monkeypatch, capsys, "data", str(tmp_path / "r.yaml"))
    assert (code, text.count("\n")) == (2, 1)
    assert "not valid YAML" in text
    (tmp_path / "r.yaml").write_text("name: a\n")
    code, text = _run(monkeypatch, capsys, "data", str(tmp_path / "r.yaml"), "data.path=[")
    assert (code, text.count("\n")) == (2, 1)
    assert "override 'data.path=['" in text


def test_the_parts_of_a_run_share_a_folder():
    commands = (cli.demo, cli.train, cli.evaluate, cli.generate, cli.bench)
    assert {str(inspect.signature(command).parameters["out"].default) for command in commands} == {"out/demo"}


def test_backends_are_reported(monkeypatch, capsys):
    code, text = _run(monkeypatch, capsys, "backends")
    assert code == 0
    for name in ("C++ operators", "triton", "flash-attn", "deepspeed"):
        assert name in text


def test_a_reader_that_leaves_is_no_error():
    code = "import sys; sys.argv = ['fastmllm', 'backends']; from fastmllm.cli import main; main()"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 141


def test_help_names_every_command(monkeypatch, capsys):
    code, text = _run(monkeypatch, capsys, "--help")
    assert code == 0
    assert all(name in text for name in cli.COMMANDS)
