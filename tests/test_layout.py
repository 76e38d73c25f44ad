"""The architecture, checked: which room imports which, who owns a dependency, sizes, and an op's four places."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastmllm"
ROOMS = {
    "kernels": set(),
    "modules": {"kernels"},
    "compression": {"kernels", "modules"},
    "models": {"kernels", "modules", "compression"},
    "data": set(),
    "train": {"kernels", "models", "data"},
    "infer": {"models", "data"},
    "eval": {"infer", "data"},
    "bench": {"infer", "eval", "compression", "data", "models"},
}
OWNERS = {
    "flash_attn": {"kernels/attention.py"},
    "flash_attn_interface": {"kernels/attention.py"},
    "deepspeed": {"fastmllm/train/engine.py"},
    "transformers": set(),
    "gguf": {"fastmllm/models/weights/gguf_file.py"},
    "onnx": {"fastmllm/models/weights/vision.py"},
    "matplotlib": {"fastmllm/bench/plots.py"},
}


def _sources() -> list[Path]:
    rooms = [p for p in PACKAGE.rglob("*.py") if "kernels" not in p.relative_to(PACKAGE).parts]
    return rooms + sorted((ROOT / "kernels").glob("*.py"))


def _imports(path: Path) -> set[str]:
    """Return the absolute names a file imports, at any depth; relative ones are resolved."""
    names = set()
    here = path.relative_to(ROOT).with_suffix("").parts
    here = ("fastmllm", *here) if here[0] == "kernels" else here
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def _room(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "fastmllm" and parts[1] in ROOMS else None


def test_a_room_never_imports_a_room_above_it():
    wrong = []
    for path in _sources():
        relative = path.relative_to(ROOT)
        room = relative.parts[0] if relative.parts[0] == "kernels" else relative.parts[1]
        if room not in ROOMS:
            continue  # configuration and command line may import all
        for name in _imports(path):
            other = _room(name)
            if other and other != room and other not in ROOMS[room]:
                wrong.append(f"{relative} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_kernels_import_nothing_of_the_package():
    for path in (ROOT / "kernels").glob("*.py"):
        outside = {n for n in _imports(path) if n.startswith("fastmllm") and not n.startswith("fastmllm.kernels")}
        assert not outside - {"fastmllm"}, f"{path.name}: {outside}"


def test_rooms_have_no_cycle():
    done: set[str] = set()
    while rest := [r for r in ROOMS if r not in done]:
        free = [r for r in rest if ROOMS[r] <= done]
        assert free, f"cycle among {rest}"
        done |= set(free)


@pytest.mark.parametrize("dependency", OWNERS)
def test_a_heavy_dependency_has_one_owner(dependency):
    users = set()
    for path in _sources():
        text = path.read_text(encoding="utf-8")
        by_name = re.search(rf"import_module\(\s*[\"']{dependency}\b", text)
        if by_name or any(n.split(".")[0] == dependency for n in _imports(path)):
            users.add(path.relative_to(ROOT).as_posix())
    assert users <= OWNERS[dependency], f"{dependency} is imported in {users - OWNERS[dependency]}"


def test_the_kernels_link_holds():
    link = PACKAGE / "kernels"
    assert link.is_symlink()
    assert link.readlink().as_posix() == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists(), "would shadow Hugging Face's package of that name"


def _tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


def test_files_stay_small():
    if not (files := _tracked()):
        pytest.skip("not a git checkout")
    code = [p for p in files if p.suffix in (".py", ".cpp", ".cu", ".h") and not p.is_symlink()]
    lines = {p.relative_to(ROOT).as_posix(): len(p.read_text(encoding="utf-8").splitlines()) for p in code}
    assert not {n: c for n, c in lines.items() if c > 600}
    ordered = sorted(lines.values())
    assert ordered[len(ordered) // 2] <= 200
    assert ordered[int(0.9 * len(ordered))] <= 400


def test_nothing_is_called_utils():
    bad = [p for p in _sources() if re.search(r"^(utils?|helpers?|misc|common|legacy)$|_v\d$", p.stem)]
    assert not bad


def _operators() -> list[str]:
    return sorted(p.stem for p in (ROOT / "kernels").glob("*.py") if not p.stem.startswith("_"))


@pytest.mark.parametrize("op", _operators())
def test_an_operator_has_its_places(op):
    text = (ROOT / "kernels" / f"{op}.py").read_text(encoding="utf-8")
    headings = re.findall(r"^# (\d)\. ([\w ]+?) -+$", text, re.MULTILINE)
    assert [int(n) for n, _ in headings] == sorted(int(n) for n, _ in headings)
    assert {"reference", "operator", "fake", "autograd", "public function"} <= {title for _, title in headings}
    assert (ROOT / "tests" / "kernels" / f"test_{op}.py").is_file()
    assert (ROOT / "benchmarks" / f"bench_{op}.py").is_file()
    triton = "@triton.jit" in text
    assert triton or list((ROOT / "csrc").glob(f"{op}.cu")), f"{op} has neither a Triton kernel nor a .cu file"


def test_every_operator_is_in_the_index():
    from fastmllm import ops

    assert set(_operators()) <= set(ops.__all__)
    assert all(callable(getattr(ops, name)) for name in ops.__all__)


def test_kernels_multiply_only_through_the_shared_dot():
    for path in (ROOT / "kernels").glob("*.py"):
        calls = re.findall(r"\btl\.dot\(", path.read_text(encoding="utf-8"))
        assert len(calls) == (1 if path.name == "_triton.py" else 0), f"{path.name}: use ._triton.dot (bf16 is wrong)"


def test_modules_and_tests_mirror_each_other():
    missing = defaultdict(list)
    for room in ROOMS:
        for path in (PACKAGE / room).glob("*.py") if room != "kernels" else ():
            if path.stem != "__init__" and not list((ROOT / "tests" / room).glob("test_*.py")):
                missing[room].append(path.name)
    assert not missing
