"""What each of two ranks runs for test_ranks.py: torchrun --nproc_per_node 2 ranks_worker.py OUT."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from train_toy import toy, trainer

from fastmllm.train.checkpoint import CheckpointError
from fastmllm.train.trainer import NonFiniteLossError, TrainingInterrupted

RANK, OUT = int(os.environ["RANK"]), Path(sys.argv[1])


def expect(kind: type[BaseException], run: Any) -> str:
    try:
        run()
    except kind as error:
        return str(error)
    raise AssertionError(f"{kind.__name__} was not raised")


for stage in (2, 3):
    # Other weights on rank 1: every rank must start from rank 0's.
    model = toy(seed=RANK, dropout=0.0)
    run = trainer(OUT / f"plain{stage}", model, engine={"zero_stage": stage, "accumulation": 2})
    run.recipe["initial_weights"] = run.recipe["frozen_weights"] = "by rank 0"
    run.run()
    whole = torch.cat([param.detach().flatten() for param in model.parameters()])
    both = [torch.empty_like(whole), torch.empty_like(whole)]
    torch.distributed.all_gather(both, whole)
    assert torch.equal(both[0], both[1]), f"ZeRO-{stage}: the ranks end with different weights"

    # Rank 1 alone gets the signal; both stop after the same step, and the run resumes to the bit.
    def signal_rank_1(record: Any) -> None:
        if record.step == 3 and RANK == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    options: dict[str, Any] = {"engine": {"zero_stage": stage}}
    trainer(OUT / f"straight{stage}", toy(dropout=0.2), **options).run()
    expect(TrainingInterrupted, trainer(OUT / f"cut{stage}", toy(dropout=0.2), on_step=signal_rank_1, **options).run)
    trainer(OUT / f"cut{stage}", toy(dropout=0.2), **options).run()

# One process stopped (test_ranks.py); two go on, by other stages too, and stop again: one process goes on then.
for name, zero_stage in (("same", 2), ("third", 3), ("none", 0)):
    options = {"engine": {"zero_stage": zero_stage}, "save_every": 2}
    trainer(OUT / f"grown-{name}", toy(), **options).run()

    def stop(record: Any) -> None:
        if record.step == 5:
            raise InterruptedError

    expect(InterruptedError, trainer(OUT / f"shrunk-{name}", toy(), on_step=stop, **options).run)

# Rank 1's disk is full during the second checkpoint: both ranks say so, neither waits for the other.
real, calls = torch.save, []


def full(state: Any, path: Any, *args: Any, **keywords: Any) -> None:
    calls.append(path)
    if RANK == 1 and len(calls) > 1:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real(state, path, *args, **keywords)


torch.save = full
began = time.perf_counter()
message = expect(CheckpointError, trainer(OUT / "full", toy(), save_every=2).run)
torch.save = real
assert time.perf_counter() - began < 20
assert "step-00000004: " in message, message
assert "No space left" in message, message
assert "step-00000002 is intact" in message, message

# A sample of rank 1 is poisoned: rank 0's message names it too.
poison = toy()
forward = poison.forward
poison.forward = lambda batch: forward(batch) * (float("nan") if "sample-5" in batch.ids else 1.0)
message = expect(NonFiniteLossError, trainer(OUT / "poison", poison).run)
assert "step 3: the loss is nan; samples sample-5;" in message, message
print(f"rank {RANK} done", flush=True)
