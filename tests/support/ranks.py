"""Processes on a CPU, one rank each, that meet over gloo: `results` starts them, `join` and `leave` frame them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SUPPORT = Path(__file__).resolve().parent
TIMEOUT = 120  # seconds


def results(script: str, world: int, folder: Path, *arguments: str) -> list[Any]:
    """Run a script of this folder as `world` ranks, `script rank world folder arguments`; return what each left."""
    paths = os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    said = [folder / f"rank{rank}.err" for rank in range(world)]  # a pipe fills up while another rank is waited for
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SUPPORT / script), str(rank), str(world), str(folder), *arguments],
            env=environment, stderr=said[rank].open("wb"),
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        for process, errors in zip(ranks, said, strict=True):
            assert process.wait(timeout=TIMEOUT) == 0, errors.read_text(errors="replace")
    finally:
        for process in ranks:  # one that failed leaves the others waiting
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]


def join() -> tuple[int, int, Path, list[str]]:
    """Meet the other ranks; return this rank, their number, the folder and the script's own arguments."""
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    return rank, world, folder, sys.argv[4:]


def leave(result: Any) -> None:
    """Save this rank's result and end the process.

    At once, without the interpreter's shutdown: threads of gloo that still hold a tensor then ask for an interpreter
    that is going away, and once in some hundred runs that aborts the process.
    """
    rank, folder = int(sys.argv[1]), Path(sys.argv[3])
    torch.save(result, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)
