"""What test_watchdog.py runs in a process of its own: ranks that are killed, stopped or fail. faults_worker.py OUT."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import forks
from train_toy import ToyBatch, sample, toy, trainer

from fastmllm.train.inventory import alive
from fastmllm.train.meters import StepRecord

OUT = Path(sys.argv[1])
found: dict[str, Any] = {}


def faulty(name: str, fault: Any, *, of: int = 1, heartbeat_s: float = 2.0, zero_stage: int = 2) -> None:
    """Let one rank meet a fault after its fifth step; note how the ranks ended, and when."""

    def work(rank: int) -> None:
        def on_step(record: StepRecord) -> None:
            if record.step == 5 and rank == of:
                (OUT / f"{name}.began").write_text(repr(time.time()))
                fault()

        engine = {"zero_stage": zero_stage, "heartbeat_s": heartbeat_s}
        try:
            trainer(OUT / name, toy(), engine=engine, on_step=on_step, save_every=2).run()
        except ZeroDivisionError:
            time.sleep(30)  # a rank that failed, and whose process is still there

    processes = forks.start(2, work, OUT / f"{name}.said")
    (ended,) = forks.wait([processes[1 - of]])
    seconds = time.time() - float((OUT / f"{name}.began").read_text())
    gone = not alive(processes[of])
    os.kill(processes[of], signal.SIGKILL)  # as torchrun does half a minute later
    forks.wait([processes[of]])
    found[name] = {"code": ended[0], "seconds": seconds, "pid": processes[of], "gone": gone}


def kill(number: int) -> Any:
    return lambda: os.kill(os.getpid(), number)


def fail() -> None:
    raise ZeroDivisionError("in the data\nof a rank")


faulty("killed", kill(signal.SIGKILL), zero_stage=3)
faulty("stopped", kill(signal.SIGSTOP))
faulty("stopped-first", kill(signal.SIGSTOP), of=0)
faulty("failed", fail)


def slow(rank: int) -> None:
    """A step of several limits, then a process that is itself paused for longer than that."""

    def batches(index: int) -> ToyBatch:
        if rank == 1 and index // 2 == 4:
            time.sleep(6)
        return sample(index)

    def pause(record: Any) -> None:
        if rank == 0 and record.step == 3:
            (OUT / "pause").write_text("")

    trainer(OUT / "slow", toy(), engine={"heartbeat_s": 4.0}, batches=batches, on_step=pause).run()


processes = forks.start(2, slow, OUT / "slow.said")
deadline = time.monotonic() + 60
while not (OUT / "pause").exists() and time.monotonic() < deadline:
    time.sleep(0.01)
for process in processes:
    os.kill(process, signal.SIGSTOP)
time.sleep(6)
for process in processes:
    os.kill(process, signal.SIGCONT)
found["slow"] = forks.wait(processes)
print(json.dumps(found))
