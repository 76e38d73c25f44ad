"""The architecture, checked: which room imports which, who owns a dependency, sizes, and an op's four places."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastmllm"
ROOMS = {
    "kernels": set(),
    "modules": {"kernels"},
    "compression": {"kernels", "modules"},
    "hf": {"kernels", "modules", "compression"},
    "data": set(),
    "models": {"kernels", "modules", "compression", "data"},
    "train": {"kernels", "models", "data"},
    "infer": {"models", "data"},
    "eval": {"infer", "data"},
    "bench": {"infer", "eval", "compression", "data", "models"},
    "plan": {"modules", "compression", "models", "data", "hf", "train", "bench"},
}
OWNERS = {
    "flash_attn": {"kernels/_flash_attn.py"},
    "flash_attn_interface": {"kernels/_flash_attn.py"},
    "deepspeed": {"fastmllm/train/engine.py"},
    "transformers": {"fastmllm/hf/trainer.py"},
    "peft": {"fastmllm/train/lora.py"},
    "trl": set(),
    "liger_kernel": {"fastmllm/hf/fused/liger.py"},
    "gguf": {"fastmllm/models/weights/gguf_file.py"},
    "onnx": {"fastmllm/models/weights/vision.py"},
    "matplotlib": {"fastmllm/bench/plots.py"},
    "av": {"fastmllm/data/video.py"},
}
PARTS = ("reference", "Triton kernels", "launchers", "operator", "fake", "autograd", "public function")


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
    """Return the room of a name, or the file beside the rooms (run, cli, ...); None for other names."""
    parts = name.split(".")
    if len(parts) < 2 or parts[0] != "fastmllm":
        return None
    return parts[1] if parts[1] in ROOMS or (PACKAGE / f"{parts[1]}.py").exists() else None


def _forbidden(room: str, names: set[str]) -> list[str]:
    return sorted(n for n in names if (other := _room(n)) and other != room and other not in ROOMS[room])


def test_a_room_never_imports_what_is_above_it():
    wrong = []
    for path in _sources():
        relative = path.relative_to(ROOT)
        room = relative.parts[0] if relative.parts[0] == "kernels" else relative.parts[1]
        if room not in ROOMS:
            continue  # configuration and command line may import all
        wrong += [f"{relative} imports {name}" for name in _forbidden(room, _imports(path))]
    assert not wrong, "\n".join([*wrong, "take a callable instead, or move the code to the room that may import it"])


def test_what_a_room_may_not_import_is_found():
    above = {"fastmllm.demo", "fastmllm.run.load_model", "fastmllm.ops", "fastmllm.eval.runner"}
    allowed = {"fastmllm", "fastmllm.__version__", "fastmllm.train.stages", "fastmllm.data", "torch.nn"}
    assert _forbidden("train", above | allowed) == sorted(above)


def test_kernels_import_nothing_of_the_package():
    for path in (ROOT / "kernels").glob("*.py"):
        outside = {n for n in _imports(path) if n.startswith("fastmllm") and not n.startswith("fastmllm.kernels")}
        assert not outside - {"fastmllm"}, f"kernels/{path.name} imports {outside}: kernels stand alone, move that down"


def test_rooms_have_no_cycle():
    done: set[str] = set()
    while rest := [r for r in ROOMS if r not in done]:
        free = [r for r in rest if ROOMS[r] <= done]
        assert free, f"cycle among {rest}: take one of their imports out of ROOMS and pass a callable"
        done |= set(free)


@pytest.mark.parametrize("dependency", OWNERS)
def test_a_heavy_dependency_has_one_owner(dependency):
    users = set()
    for path in _sources():
        text = path.read_text(encoding="utf-8")
        by_name = re.search(rf"import_module\(\s*[\"']{dependency}\b", text)
        if by_name or any(n.split(".")[0] == dependency for n in _imports(path)):
            users.add(path.relative_to(ROOT).as_posix())
    others, owners = users - OWNERS[dependency], OWNERS[dependency] or "tests"
    assert not others, f"{others} import {dependency}: use what {owners} offers"


def test_the_kernels_link_holds():
    link = PACKAGE / "kernels"
    remedy = "restore it: ln -sfn ../kernels fastmllm/kernels"
    assert link.is_symlink(), f"fastmllm/kernels is not a link: {remedy}"
    assert link.readlink().as_posix() == "../kernels", f"fastmllm/kernels leads elsewhere: {remedy}"
    assert not (ROOT / "kernels" / "__init__.py").exists(), "delete kernels/__init__.py: it shadows a package"


def _tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


def test_files_stay_small():
    if not (files := _tracked()):
        pytest.skip("not a git checkout")
    code = [p for p in files if p.suffix in (".py", ".cpp", ".cu", ".cuh", ".h") and not p.is_symlink()]
    lines = {p.relative_to(ROOT).as_posix(): len(p.read_text(encoding="utf-8").splitlines()) for p in code}
    ranked = sorted(lines, key=lines.__getitem__)
    for share, limit in ((0.5, 150), (0.9, 350), (1.0, 600)):
        name = ranked[min(int(share * len(ranked)), len(ranked) - 1)]
        assert lines[name] <= limit, (
            f"{name} has {lines[name]} lines, and {share:.0%} of the code files must stay within {limit}: split by "
            f"subject the longest that you touched, of {ranked[-8:]}"
        )


def test_nothing_is_called_utils():
    bad = [p for p in _sources() if re.search(r"^(utils?|helpers?|misc|common|legacy)$|_v\d$", p.stem)]
    assert not bad, f"{[p.relative_to(ROOT).as_posix() for p in bad]}: name a file for what it holds"


def _operators() -> list[str]:
    return sorted(p.stem for p in (ROOT / "kernels").glob("*.py") if not p.stem.startswith("_"))


def _jitted(name: str) -> set[str]:
    """Return the Triton functions of a kernel file and of the private files that it imports."""
    tree = ast.parse((ROOT / "kernels" / f"{name}.py").read_text(encoding="utf-8"))
    found = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    }
    private = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module]
    return found.union(*(_jitted(module) for module in private if module != "_triton"))


def test_a_comment_is_no_kernel():
    assert not _jitted("insert_features")  # CUDA C++ only
    assert _jitted("layer_norm") == _jitted("_norm") != set()


@pytest.mark.parametrize("op", _operators())
def test_an_operator_has_its_places(op):
    text = (ROOT / "kernels" / f"{op}.py").read_text(encoding="utf-8")
    headings = re.findall(r"^# (\d)\. ([\w ]+?) -+$", text, re.MULTILINE)
    assert headings == sorted(headings), f"kernels/{op}.py: its parts stand in another order than CONTRIBUTING's"
    native = (ROOT / "csrc" / f"{op}.cu").is_file()
    needed = [(str(n), part) for n, part in enumerate(PARTS, 1) if not (native and n in (2, 3))]
    missing = [f"# {n}. {part} ---" for n, part in needed if (n, part) not in headings]
    assert not missing, f"kernels/{op}.py lacks the headings {missing}, with dashes to column 120"
    for place in (f"tests/kernels/test_{op}.py", f"benchmarks/bench_{op}.py"):
        assert (ROOT / place).is_file(), f"{op} needs {place}: CONTRIBUTING says what goes in"
    if _jitted(op):
        assert '.register_kernel("cuda")' in text, f'kernels/{op}.py: add _{op}.register_kernel("cuda")({op}_triton)'
        bench = ast.parse((ROOT / "benchmarks" / f"bench_{op}.py").read_text(encoding="utf-8")).body
        named = {node.name for node in bench if isinstance(node, ast.FunctionDef)}
        assert "aot_cases" in named, f"benchmarks/bench_{op}.py: define aot_cases(), which compiles them"
    else:
        assert native, f"{op} has neither a Triton kernel nor csrc/{op}.cu: without one it is no operator"


def test_every_operator_is_in_the_index():
    from fastmllm import ops

    missing = set(_operators()) - set(ops.__all__)
    assert not missing, f"import {missing} in fastmllm/ops.py and name them in its __all__"
    assert list(ops.__all__) == sorted(ops.__all__), "put the names in fastmllm/ops.py in alphabetical order"
    assert all(callable(getattr(ops, name)) for name in ops.__all__)


def test_every_operator_is_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("\n## Operators\n")[2].partition("\n## ")[0]
    differ = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) ^ set(_operators())
    assert not differ, f"README's table of operators and kernels/ differ in {differ}: add or remove the rows"


def test_kernels_multiply_only_through_the_shared_dot():
    for path in (ROOT / "kernels").glob("*.py"):
        calls = re.findall(r"\btl\.dot\(", path.read_text(encoding="utf-8"))
        assert len(calls) == (1 if path.name == "_triton.py" else 0), f"{path.name}: use ._triton.dot (bf16 is wrong)"


def _modules(room: str) -> dict[str, Path]:
    """Return dotted name -> file of a room; a package goes by its folder's name."""
    folder = ROOT / "kernels" if room == "kernels" else PACKAGE / room
    files = {path.relative_to(folder).with_suffix("").parts: path for path in folder.rglob("*.py")}
    return {".".join(("fastmllm", room, *p)).removesuffix(".__init__"): path for p, path in files.items()}


@pytest.mark.parametrize("room", ROOMS)
def test_tests_mirror_a_room_and_reach_its_files(room):
    """A test imports each file, or a file of the same room that uses it."""
    assert list((ROOT / "tests" / room).glob("test_*.py")), f"write tests/{room}/test_<file>.py"
    modules = _modules(room)
    tested = {name for path in (ROOT / "tests").rglob("*.py") for name in _imports(path)}
    used = {name for tested_file in tested & modules.keys() for name in _imports(modules[tested_file])}
    missing = [n for n, p in modules.items() if p.stem != "__init__" and n not in tested | used]
    assert not missing, f"no test imports {missing}, nor a file that uses them: write tests/{room}/test_<file>.py"


def test_folders_of_tests_are_rooms():
    folders = {p.parent.relative_to(ROOT / "tests").parts[0] for p in (ROOT / "tests").glob("*/**/*.py")}
    others = folders - {*ROOMS, "support"}
    assert not others, f"tests/{others}: name a folder of tests after its room"
