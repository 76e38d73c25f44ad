"""Compile every Triton kernel for GPUs that are not here, and keep a table of what the machine code costs.

    python benchmarks/aot.py [--op NAME] [--triton-path DIR]            compile, print, rewrite results/aot.json
    python benchmarks/aot.py --check [--op NAME] [--triton-path DIR]    compile, compare with the committed table

Each bench_<op>.py names its cases in `aot_cases()`: pairs of a name and a callable that calls launchers on meta
tensors. Launching is replaced by compiling, in processes of their own (the interpreter must be off, and each triton
wants its own). The triton wheel brings ptxas, the disassembler and lld: no device, driver or toolkit is needed.

A row of the table carries a digest of what the compiler is given (source, signature, constants, options, target): where
it is the same, the row is taken as it stands, so that a check costs seconds; but about ten rows, others every day, are
compiled all the same, so that no row stays unproved. --fresh compiles everything again.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "aot.json"
CACHE = ROOT / "build" / "aot-cache"
REMEDY = (
    "if it is meant, run `python benchmarks/aot.py` with the same --triton-path and commit benchmarks/results/aot.json"
)
PROVED_DAILY = 300  # one known row in so many is compiled again
GROWTH = 15  # per cent more registers or instructions than in the table fail the check

Row = dict[str, Any]
Rows = dict[str, dict[str, Row]]  # "<op> <case> <kernel>" -> target -> row


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A GPU to compile for: triton's backend name, architecture, lanes of a warp, bytes of shared memory."""

    backend: str
    arch: int | str
    lanes: int
    shared: int


TARGETS = {
    "sm_80": Target(backend="cuda", arch=80, lanes=32, shared=163 * 1024),
    "sm_90": Target(backend="cuda", arch=90, lanes=32, shared=227 * 1024),
    "sm_100": Target(backend="cuda", arch=100, lanes=32, shared=227 * 1024),
    "gfx942": Target(backend="hip", arch="gfx942", lanes=64, shared=64 * 1024),
}


# The comparison -------------------------------------------------------------------------------------------------------
def problems(fresh: dict[str, Rows], table: dict[str, Rows], complete: bool = True) -> list[str]:
    """List what is wrong with freshly compiled kernels, alone and against the committed table.

    Args:
        fresh: triton version -> rows just compiled.
        table: triton version -> committed rows; a version that it lacks is checked alone.
        complete: every operator was compiled, so rows that only the table has are stale.

    Returns:
        One message a finding: kernel, target, field, old -> new, what to do. Empty if all is well.
    """
    found = []
    for version, kernels in fresh.items():
        known = table.get(version)
        for kernel, targets in kernels.items():
            for target, row in targets.items():
                old = None if known is None else known.get(kernel, {}).get(target)
                where = f"triton {version}: {kernel} on {target}: "
                found += [where + text for text in _alone(row, target)]
                if known is not None and old is None and "error" not in row:
                    found.append(f"{where}not in the table: {REMEDY}")
                if old is not None and "error" not in row:
                    found += [where + text for text in _against(row, old)]
        if complete and known is not None:
            stale = sorted(known.keys() - kernels.keys())
            found += [f"triton {version}: {kernel}: in the table, but no longer compiled: {REMEDY}" for kernel in stale]
    return found


def _alone(row: Row, target: str) -> list[str]:
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    found = []
    if row["spill"]:
        found.append(f"spills {row['spill']}: choose a smaller tile or more warps in the operator's _config")
    if row["shared"] > TARGETS[target].shared:
        found.append(f"shared memory {row['shared']} exceeds the target's {TARGETS[target].shared} bytes: choose a "
                     "smaller tile or fewer stages in the operator's _config")  # fmt: skip
    return found


def _against(row: Row, old: Row) -> list[str]:
    found = []
    for field in ("registers", "instructions"):
        if 100 * row[field] > (100 + GROWTH) * old[field]:
            growth = 100 * (row[field] / max(old[field], 1) - 1)
            found.append(f"{field} {old[field]} -> {row[field]} (+{growth:.0f} %): {REMEDY}")
    for opcode, count in old["tensor"].items():
        if count and not row["tensor"].get(opcode):
            found.append(
                f"{opcode} {count} -> 0, tensor cores lost: check the dtypes and the tile that `dot` gets; {REMEDY}"
            )
    widest, before = (max((int(w) for w in r["loads"]), default=0) for r in (row, old))
    if widest < before:
        found.append(f"widest load {before} -> {widest} bits: check alignment and contiguity of the offsets; {REMEDY}")
    return found


# What the machine code says -------------------------------------------------------------------------------------------
def _measure_cuda(kernel: Any, binaries: Path) -> Row:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [binaries / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run(
            [binaries / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    use = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", sass)
    loads: collections.Counter[str] = collections.Counter()
    tensor: collections.Counter[str] = collections.Counter()
    for opcode in code:
        head = opcode.split(".")[0]
        if head in ("LDG", "LDGSTS"):
            width = re.search(r"\.(128|64|[US](?:16|8))(?=\.|$)", opcode)
            loads[width[1].lstrip("US") if width else "32"] += 1
        elif head in ("HMMA", "IMMA", "HGMMA", "QGMMA", "IGMMA"):
            tensor[head] += 1
        elif head.startswith("UTC") and head.endswith("MMA"):
            tensor["UTCMMA"] += 1
    return {
        "registers": use["REG"],
        "spill": use["STACK"] + use["LOCAL"],
        "shared": kernel.metadata.shared,
        "instructions": sum(opcode.split(".")[0] != "NOP" for opcode in code),
        "tensor": dict(tensor),
        "loads": dict(loads),
    }


def _measure_hip(kernel: Any) -> Row:
    assembly = kernel.asm["amdgcn"]

    def count(name: str) -> int:
        match = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(match[1]) if match else 0

    code = re.findall(r"^\t([a-z]\w+)", assembly, re.MULTILINE)
    loads: collections.Counter[str] = collections.Counter()
    for opcode in code:
        match = re.match(r"(?:buffer|global)_load_(dword|dwordx2|dwordx3|dwordx4|[us](?:short|byte)\w*)$", opcode)
        if match:
            kind = match[1]
            width = 32 * int(kind[6:] or 1) if kind.startswith("dword") else 16 if "short" in kind else 8
            loads[str(width)] += 1
    mfma = sum(opcode.startswith("v_mfma") for opcode in code)
    return {
        "registers": count("vgpr_count"),
        "spill": count("private_segment_fixed_size"),  # scalar registers spill to vector lanes, not to memory
        "shared": kernel.metadata.shared,
        "instructions": len(code),
        "tensor": {"MFMA": mfma} if mfma else {},
        "loads": dict(loads),
    }


# The worker: one process, one triton ----------------------------------------------------------------------------------
def _stub_driver(target: Target, number: int) -> Any:
    """Stand in for a GPU driver; kernels are cached per device number, so each target has its own."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    answers = {
        "get_current_target": GPUTarget(target.backend, target.arch, target.lanes),
        "get_current_device": number,
        "get_current_stream": 0,
        "get_active_torch_device": torch.device("cpu"),
    }
    methods: dict[str, Any] = {name: (lambda self, *_, answer=answer: answer) for name, answer in answers.items()}
    for name in DriverBase.__abstractmethods__ - methods.keys():
        methods[name] = lambda self, *_: None
    return type("StubDriver", (DriverBase,), methods)()


def _cases(bench: str) -> list[tuple[str, Any]]:
    module = runpy.run_path(str(ROOT / "benchmarks" / f"{bench}.py"), run_name=bench)
    return list(module["aot_cases"]()) if "aot_cases" in module else []


def _source(function: Any, seen: set[str]) -> str:
    """Return the source of a kernel and of its helpers; triton's own cache key depends on the order of calls."""
    seen.add(function.__name__)
    parts = [function.src]
    for name in sorted(function.fn.__code__.co_names):
        value = function.fn.__globals__.get(name)
        if hasattr(value, "src") and name not in seen:
            parts.append(_source(value, seen))
        elif type(value).__name__ == "constexpr":
            parts.append(f"{name} = {value}")
    return "\n".join(parts)


def _inputs_digest(function: Any, target: Any, signature: Any, constants: Any, options: Any, attributes: Any) -> str:
    """Digest everything that decides the machine code, apart from triton's version."""
    values = {path: _source(value, set()) if hasattr(value, "src") else value for path, value in constants.items()}
    settings = {k: v for k, v in options.__dict__.items() if k != "extern_libs"}  # those are paths of this machine
    given = (
        _source(function, set()),
        str(target),
        signature,
        sorted(values.items()),
        sorted(settings.items()),
        attributes,
    )
    return hashlib.sha256(repr(given).encode()).hexdigest()[:16]


def _drawn(digest: str) -> bool:
    """Tell whether a row that the table knows is compiled today all the same."""
    return int(hashlib.sha256(f"{datetime.date.today()} {digest}".encode()).hexdigest(), 16) % PROVED_DAILY == 0


def work(benches: list[str], shard: int, shards: int, fresh: bool) -> None:
    """Compile every shards-th case of some benchmarks for every target; print one JSON line a case and target."""
    sys.path.insert(0, str(ROOT))
    import triton
    from triton.runtime.jit import JITFunction

    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    store = CACHE / f"machine-code-{triton.__version__}"
    store.mkdir(parents=True, exist_ok=True)
    committed = read_table().get(triton.__version__, {}) if not fresh else {}
    known = {row["inputs"]: row for targets in committed.values() for row in targets.values()}
    launched: list[tuple[str, Any]] = []
    original, originally_compile = JITFunction.run, JITFunction._do_compile

    def compile_or_know(self: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any,
                        warmup: bool) -> Any:  # fmt: skip
        target = self.device_caches[device][2]
        digest = _inputs_digest(self, target, signature, constants, options, attributes)
        if digest in known and not _drawn(digest):
            return known[digest]
        kernel = originally_compile(self, key, signature, device, constants, options, attributes, warmup)
        kernel.inputs_digest = digest
        return kernel

    @functools.wraps(original)
    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        try:
            launched.append((self.fn.__name__, original(self, *args, grid=grid, warmup=True, **options)))
        except Exception as error:  # whatever the compiler throws: the other kernels are still of interest
            launched.append((self.fn.__name__, error))

    JITFunction.run, JITFunction._do_compile = compile_instead, compile_or_know

    def measure(kernel: Any) -> Row:
        if isinstance(kernel, dict):
            return kernel
        if isinstance(kernel, Exception):
            cause = kernel
            while cause.__cause__ is not None:  # a compiler wraps what went wrong in where it went wrong
                cause = cause.__cause__
            return {"error": f"{type(cause).__name__}: {' '.join(str(cause).split())[-300:]}"}
        hip = "amdgcn" in kernel.asm
        code = kernel.asm["amdgcn"].encode() if hip else kernel.asm["cubin"]
        seen = store / hashlib.sha256(code + Path(__file__).read_bytes()).hexdigest()
        if not seen.exists():
            row = _measure_hip(kernel) if hip else _measure_cuda(kernel, binaries)
            part = seen.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(row))
            part.replace(seen)
        return json.loads(seen.read_text()) | {"inputs": kernel.inputs_digest}

    cases: list[tuple[str, str, Any]] = []
    for bench in benches:
        try:
            cases += [(bench, name, call) for name, call in _cases(bench)]
        except Exception as error:
            rows = {f"{bench.removeprefix('bench_')} (file)": {"sm_80": measure(error)}}
            print(json.dumps({"bench": bench, "rows": rows}), flush=True)
    cases = cases[shard::shards]
    print(json.dumps({"total": len(cases) * len(TARGETS)}), flush=True)
    for number, (name, target) in enumerate(TARGETS.items()):
        triton.runtime.driver.set_active(_stub_driver(target, number))
        for bench, case, call in cases:
            launched.clear()
            try:
                call()
            except Exception as error:
                launched.append(("(launcher)", error))
            rows = {}
            for function, kernel in launched:
                label, row = f"{bench.removeprefix('bench_')} {case} {function}", measure(kernel)
                twins = [r for k, r in rows.items() if k == label or k.startswith(f"{label} #")]
                if row not in twins:  # one kernel launched in several forms
                    rows[label if not twins else f"{label} #{len(twins) + 1}"] = row
            out = {"bench": bench, "rows": {label: {name: row} for label, row in rows.items()}}
            print(json.dumps(out), flush=True)


# The parent -----------------------------------------------------------------------------------------------------------
def triton_version(path: str | None) -> str:
    """Return the version of the installed triton, or of the one in a folder, without importing it."""
    if path is None:
        return importlib.metadata.version("triton")
    init = Path(path) / "triton" / "__init__.py"
    match = re.search(r"__version__ = ['\"]([\d.]+)", init.read_text()) if init.exists() else None
    if match is None:
        raise SystemExit(f"aot: no triton in {path}: pip install --target {path} --no-deps triton==3.6.0")
    return match[1]


def _stamp(bench: str, version: str) -> Path:
    files = [Path(__file__), ROOT / "benchmarks" / f"{bench}.py", *sorted((ROOT / "kernels").glob("*.py"))]
    digest = hashlib.sha256("\0".join(file.read_text() for file in files).encode()).hexdigest()[:24]
    return CACHE / "rows" / f"{bench}-{version}-{digest}.json"


def compile_all(paths: list[str | None], op: str | None = None, again: bool = False) -> dict[str, Rows]:
    """Compile the cases of every benchmark (or one operator's) with every triton, two processes at a time.

    Args:
        paths: folders that hold a triton package; None is the installed one.
        op: the name of one operator, or None for all.
        again: compile even what the table or the cache knows.

    Returns:
        triton version -> rows.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    benches = sorted(file.stem for file in (ROOT / "benchmarks").glob("bench_*.py") if op in (None, file.stem[6:]))
    if not benches:
        raise SystemExit(f"aot: there is no benchmarks/bench_{op}.py")
    versions = {triton_version(path): path for path in paths}
    fresh: dict[str, dict[str, Rows]] = {version: {bench: {} for bench in benches} for version in versions}
    stamps = {(bench, version): _stamp(bench, version) for bench in benches for version in versions}
    jobs = []
    for version, path in versions.items():
        missing = [bench for bench in benches if again or not stamps[bench, version].exists()]
        for bench in set(benches) - set(missing):
            fresh[version][bench] = json.loads(stamps[bench, version].read_text())
        shards = 1 if len(versions) > 1 else 2
        jobs += [(version, path, missing, shard, shards) for shard in range(shards) if missing]

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress, concurrent.futures.ThreadPoolExecutor(2) as pool:

        def follow(version: str, path: str | None, missing: list[str], shard: int, shards: int) -> None:
            bar = progress.add_task(f"triton {version}", total=None)
            environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
            environment |= {"TRITON_CACHE_DIR": str(CACHE / f"triton-{version}"), "TRITON_DEFAULT_FP_FUSION": "1",
                            "OMP_NUM_THREADS": "1", **({"PYTHONPATH": path} if path else {})}  # fmt: skip
            command = [sys.executable, __file__, "--work", *missing, "--shard", str(shard), str(shards)]
            command += ["--fresh"] if again else []
            with (
                tempfile.TemporaryFile("w+") as errors,
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
            ):
                assert process.stdout is not None
                for line in process.stdout:
                    if not line.startswith("{"):
                        continue  # what compilers print
                    message = json.loads(line)
                    if "total" in message:
                        progress.update(bar, total=message["total"])
                        continue
                    progress.advance(bar)
                    rows = fresh[version][message["bench"]]
                    for kernel, targets in message["rows"].items():
                        rows.setdefault(kernel, {}).update(targets)
                if process.wait():
                    errors.seek(0)
                    raise SystemExit(f"aot: the process for triton {version} died:\n{errors.read()[-2000:]}")

        for job in [pool.submit(follow, *job) for job in jobs]:
            job.result()
    for version, _, missing, _, _ in jobs:
        for bench in missing:
            rows = fresh[version][bench]
            if not any("error" in row for targets in rows.values() for row in targets.values()):
                stamps[bench, version].parent.mkdir(parents=True, exist_ok=True)
                stamps[bench, version].write_text(json.dumps(rows))
    return {
        version: {k: v for rows in by_bench.values() for k, v in rows.items()} for version, by_bench in fresh.items()
    }


def read_table() -> dict[str, Rows]:
    """Return the committed table, empty if there is none."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def write_table(table: dict[str, Rows]) -> None:
    """Write the table sorted, one line a kernel and target, so that a change reads well in a diff."""
    versions = []
    for version in sorted(table):
        kernels = []
        for kernel in sorted(table[version]):
            targets = table[version][kernel]
            lines = [f"   {json.dumps(t)}: {json.dumps(targets[t], sort_keys=True)}" for t in TARGETS if t in targets]
            kernels.append(f"  {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n  }")
        versions.append(f" {json.dumps(version)}: {{\n" + ",\n".join(kernels) + "\n }")
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text("{\n" + ",\n".join(versions) + "\n}\n")


def _print(rows: Rows, version: str) -> None:
    for kernel in sorted(rows):
        for target, row in rows[kernel].items():
            text = row.get("error") or " ".join(
                f"{name} {json.dumps(value) if isinstance(value, dict) else value}" for name, value in row.items()
            )
            print(f"{version} {target:6s} {kernel}: {text}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if a kernel fails the check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed table, change nothing")
    parser.add_argument("--fresh", action="store_true", help="compile even what the table or the cache knows")
    parser.add_argument("--op", help="one operator only")
    parser.add_argument("--triton-path", action="append", default=[], metavar="DIR", help="a further triton to use")
    parser.add_argument("--only-path", action="store_true", help="leave the installed triton out")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--shard", nargs=2, type=int, default=(0, 1), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        work(options.work, *options.shard, options.fresh)
        return 0
    fresh = compile_all([*([] if options.only_path else [None]), *options.triton_path], options.op, options.fresh)
    table = read_table()
    if not options.check:
        for version, rows in fresh.items():
            _print(rows, version)
            kept = {k: v for k, v in table.get(version, {}).items() if options.op and k.split()[0] != options.op}
            table[version] = kept | {k: t for k, t in rows.items() if not any("error" in row for row in t.values())}
        write_table(table)
    found = problems(fresh, table, complete=options.op is None)
    for message in found:
        print(f"aot: {message}", file=sys.stderr)
    count = sum(len(targets) for rows in fresh.values() for targets in rows.values())
    print(f"aot: {count} kernel builds for {', '.join(TARGETS)} with triton {', '.join(fresh)}: {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
