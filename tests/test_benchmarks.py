"""The benchmarks' fixture keeps what a run measured, and `make gpu` ends in time."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench():
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("bench_conftest", ROOT / "benchmarks" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_cpu_row_has_wall_time_beside(bench):
    times = bench._time_cpu({"ours": lambda: sum(range(1000))})["ours"]
    assert times["wall_us"] > 0
    assert times["seconds"] > 0


def test_rows_are_stored_case_by_case_beside_older_ones(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_folder", lambda: tmp_path)
    old = [{"op": "x", "case": "b", "mode": "full", "us": 1}, {"op": "x", "case": "a", "mode": "full", "us": 2}]
    (tmp_path / "x.json").write_text(json.dumps(old))
    bench._store([{"op": "x", "case": "a", "mode": "full", "us": 3.00001, "wall_us": 4.0}])
    got = json.loads((tmp_path / "x.json").read_text())
    assert got == [{"op": "x", "case": "a", "mode": "full", "us": 3.0, "wall_us": 4.0}, old[0]]
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_an_interrupted_run_lists_what_it_left_out(tmp_path):
    shutil.copy(ROOT / "benchmarks" / "conftest.py", tmp_path)
    (tmp_path / "bench_a.py").write_text("def bench_a(): pass\ndef bench_b(): raise KeyboardInterrupt\n"
                                         "def bench_c(): pass\n")  # fmt: skip
    options = "-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", "-p", "no:cacheprovider"
    command = [sys.executable, "-m", "pytest", "--rootdir", tmp_path, tmp_path, *options]
    out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stdout
    assert out.split("left out")[1].split()[1:3] == ["bench_a.py::bench_b", "bench_a.py::bench_c"], out


@pytest.mark.skipif(not shutil.which("make") or not shutil.which("timeout"), reason="needs make and timeout")
@pytest.mark.parametrize(("tests", "bench", "code", "said"), [
    ("exit 0", "exit 0", 0, ""),
    ("exit 1", "exit 0", 2, ""),
    ("exit 0", "sleep 9", 0, "2 s are over"),
    ("sleep 9", "exit 0", 2, "nothing was measured"),
])  # fmt: skip
def test_make_gpu_ends_in_time(tests, bench, code, said, tmp_path):
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "ran $*"\ncase "$*" in *tests/kernels*) {tests};; *benchmarks*) {bench};; esac\n'
    )
    python.chmod(0o755)
    command = ["make", "-s", "gpu", f"PYTHON={python}", "GPU_SECONDS=2"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert run.returncode == code, run.stdout + run.stderr
    assert said in run.stdout
    assert run.stdout.index("build_ext") < run.stdout.index("tests/kernels")
    for suite in ("alignment", "train_step"):  # last, while there is time
        assert f"suite/{suite}.py" in run.stdout or " s are over" in run.stdout or said
