"""Every Triton kernel compiles for four GPUs that are not here, without a spill, as the committed table says."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SECOND = sorted(path for path in (ROOT / "build").glob("triton-*") if (path / "triton" / "__init__.py").exists())

spec = importlib.util.spec_from_file_location("aot", ROOT / "benchmarks" / "aot.py")
aot = importlib.util.module_from_spec(spec)
sys.modules["aot"] = aot
spec.loader.exec_module(aot)

ROW = {
    "inputs": "0123456789abcdef",
    "registers": 100,
    "spill": 0,
    "shared": 65536,
    "instructions": 1000,
    "tensor": {"HGMMA": 8},
    "loads": {"128": 4, "32": 2},
}


def _table(**changes):
    return {"3.9.0": {"patch_embed 1024 _fwd_kernel": {"sm_90": copy.deepcopy(ROW) | changes}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spill": 216}, r"spills 216: .*smaller tile"),
        ({"tensor": {"HMMA": 64}}, r"HGMMA 8 -> 0, tensor cores lost"),
        ({"tensor": {}}, r"HGMMA 8 -> 0"),
        ({"registers": 116}, r"registers 100 -> 116 \(\+16 %\)"),
        ({"instructions": 1151}, r"instructions 1000 -> 1151"),
        ({"shared": 227 * 1024 + 1}, r"shared memory 232449 exceeds the target's 232448"),
        ({"loads": {"64": 8}}, r"widest load 128 -> 64 bits"),
    ],
)
def test_a_worse_kernel_is_named(changes, message):
    (found,) = aot.problems(_table(**changes), _table())
    assert found.startswith("triton 3.9.0: patch_embed 1024 _fwd_kernel on sm_90: ")
    assert re.search(message, found)


@pytest.mark.parametrize("changes", [{}, {"registers": 115}, {"instructions": 700}, {"tensor": {"HGMMA": 4}}])
def test_an_equal_or_better_kernel_passes(changes):
    assert aot.problems(_table(**changes), _table()) == []


def test_what_does_not_compile_is_named():
    broken = {"3.9.0": {"patch_embed 1024 _fwd_kernel": {"sm_90": {"error": "PTXASError: no registers"}}}}
    (found,) = aot.problems(broken, _table())
    assert "does not compile: PTXASError" in found


def test_the_table_may_neither_lack_a_kernel_nor_keep_a_dead_one():
    (found,) = aot.problems(_table(), {"3.9.0": {}})
    assert "not in the table" in found
    (found,) = aot.problems({"3.9.0": {}}, _table())
    assert "no longer compiled" in found
    assert aot.problems({"3.9.0": {}}, _table(), complete=False) == []


def test_an_unknown_triton_is_checked_alone():
    fresh = {"4.0.0": _table(registers=200)["3.9.0"]}
    assert aot.problems(fresh, _table()) == []
    assert len(aot.problems({"4.0.0": _table(spill=8)["3.9.0"]}, _table())) == 1


def test_the_table_is_sorted_and_survives_a_rewrite(tmp_path, monkeypatch):
    monkeypatch.setattr(aot, "TABLE", tmp_path / "aot.json")
    table = _table() | {"3.6.0": _table()["3.9.0"]}
    aot.write_table(table)
    first = aot.TABLE.read_text()
    assert aot.read_table() == table
    assert list(json.loads(first)) == ["3.6.0", "3.9.0"]
    aot.write_table(dict(reversed(table.items())))
    assert aot.TABLE.read_text() == first


def _check(*arguments):
    command = [sys.executable, ROOT / "benchmarks" / "aot.py", "--check", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-6000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_fit_every_target():
    pytest.importorskip("triton")
    _check()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_fit_every_target_with_a_second_triton():
    if not SECOND:
        pytest.skip(
            "no second triton: pip install --target build/triton-3.6.0 --no-deps triton==3.6.0 (make test does)"
        )
    _check("--only-path", *(argument for path in SECOND for argument in ("--triton-path", str(path))))


def test_a_digest_follows_helpers_and_not_lines(tmp_path):
    """A row is taken from the table only while its kernel, what it calls and its settings are the same."""
    pytest.importorskip("triton")
    code = """
import sys
sys.path[:0] = [{root!r}, {folder!r}]
import aot
import kernel
class Options: pass
options = Options(); options.num_warps = 4; options.extern_libs = {folder!r}
print(aot._inputs_digest(kernel.outer, "sm_90", {{"x": "*bf16"}}, {{(1,): 64}}, options, {{}}))
"""
    kernel = """
import triton
{blank}
@triton.jit
def inner(x):
    return x + {one}
@triton.jit
def outer(x, N):
    return inner(x)
"""

    def digest(name, **changes):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "kernel.py").write_text(kernel.format(**({"blank": "", "one": 1} | changes)))
        script = code.format(root=str(ROOT / "benchmarks"), folder=str(folder))
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        return subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
        ).stdout

    first = digest("first")
    assert len(first.strip()) == 16
    assert digest("moved", blank="\n\n") == first
    assert digest("changed", one=2) != first


def test_some_known_rows_are_proved_again_others_every_day(monkeypatch):
    digests = [f"{k:016x}" for k in range(3000)]
    drawn = {d for d in digests if aot._drawn(d)}
    assert 1 <= len(drawn) <= 40

    class Tomorrow(aot.datetime.date):
        @classmethod
        def today(cls):
            return aot.datetime.date(2100, 1, 1)

    monkeypatch.setattr(aot.datetime, "date", Tomorrow)
    assert {d for d in digests if aot._drawn(d)} != drawn
