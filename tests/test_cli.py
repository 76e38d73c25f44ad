"""The command line: a mistake ends in one clear line and exit code 2, and help names every command."""

from __future__ import annotations

import errno
import inspect
import json
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


def _stored(folder, said):
    records = [
        {"id": f"q{i}", "task": "caption", "condition": "model", "verdict": float(t == "right"), "answer": "right",
         "said": t, "prompt": "?", "image": None}
        for i, t in enumerate(said)
    ]  # fmt: skip
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps({"value": {"records": records}}))
    return str(folder)


def test_evaluations_are_compared_and_judged(monkeypatch, capsys, tmp_path):
    runs = [_stored(tmp_path / n, said) for n, said in (("a", ["right"] * 9 + ["wrong"]), ("b", ["wrong"] * 10))]
    code, text = _run(monkeypatch, capsys, "eval", "compare", *runs, "--json")
    assert code == 0
    assert json.loads(text)["tasks"][0]["only_a"] == 9
    people, out = tmp_path / "people.jsonl", tmp_path / "judged"
    arguments = ("eval", "judge", *runs, "--task", "caption", "--human", str(people), "--out", str(out))
    assert "waits for a person" in _run(monkeypatch, capsys, *arguments)[1].replace("\n", " ")
    asked = [json.loads(line) for line in people.read_text().splitlines()]
    for entry in asked:
        entry["verdict"] = "1" if "[Answer 1]\nright" in entry["prompt"] else "2"
    people.write_text("\n".join(json.dumps(entry) for entry in asked))
    code, text = _run(monkeypatch, capsys, *arguments)
    assert code == 0
    assert "95 [" in text  # nine wins; the tenth pair is of equal answers, whose orders contradict each other
    code, text = _run(monkeypatch, capsys, "eval", "judge", *runs, "--task", "caption", "--out", str(out))
    assert (code, "give --url and --model" in text) == (2, True)
    code, text = _run(monkeypatch, capsys, "eval", "compare", runs[0], str(tmp_path))
    assert (code, "run fastmllm eval with --out first" in text.replace("\n", " ")) == (2, True)


def test_a_missing_set_is_said_in_one_line(monkeypatch, capsys, tmp_path):
    code, text = _run(monkeypatch, capsys, "eval", "baselines", f"gqa={tmp_path}")
    assert (code, "it must hold testdev_balanced_questions.json" in text) == (2, True)
    rows = {"1": {"question": "Who?", "imageId": "n1", "answer": "woman"}, "2": []}
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps(rows))
    code, text = _run(monkeypatch, capsys, "eval", "baselines", f"gqa={tmp_path}")
    assert code == 0
    assert "skipped 1: malformed row" in text
    assert _run(monkeypatch, capsys, "eval", "baselines")[0] == 2
