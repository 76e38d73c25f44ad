"""Ranks as forks of one process that has imported everything: what is killed, stopped and run again in a second."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from fastmllm.train.engine import _deepspeed

_deepspeed()
# what making an engine imports, inductor with it: once, not in every fork, and of no concern to garbage collection
importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
gc.collect()
gc.freeze()


def start(ranks: int, work: Callable[[int], None], said: Path) -> list[int]:
    """Fork ranks that meet on a free port; what rank r says goes to the file said.<r>; return their processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said.parent.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(ranks):
        process = os.fork()
        if process:
            processes.append(process)
            continue
        code = 1
        try:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
            sys.stdout = sys.stderr = Path(f"{said}.{rank}").open("w", buffering=1)  # noqa: SIM115
            work(rank)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return processes


def wait(processes: Sequence[int], limit_s: float = 60.0) -> list[tuple[int, float]]:
    """Return exit code (negative: the signal) and seconds until the end of each; what outlives the limit is killed."""
    began, ended = time.monotonic(), {}
    while len(ended) < len(processes):
        for process in processes:
            if process not in ended and (status := os.waitpid(process, os.WNOHANG))[0]:
                ended[process] = (os.waitstatus_to_exitcode(status[1]), time.monotonic() - began)
        if time.monotonic() - began > limit_s:
            for process in set(processes) - set(ended):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)
    return [ended[process] for process in processes]


def run(ranks: int, work: Callable[[int], None], said: Path, limit_s: float = 60.0) -> None:
    """Run ranks to their end, which must be a good one and within the limit."""
    codes = [code for code, _ in wait(start(ranks, work, said), limit_s)]
    if any(codes):
        texts = [Path(f"{said}.{rank}").read_text()[-3000:] for rank in range(ranks)]
        raise AssertionError(f"{said.name} ended with {codes}\n" + "\n".join(texts))
