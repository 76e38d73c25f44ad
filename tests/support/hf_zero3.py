"""What each rank runs for tests/hf/test_zero3.py: steps under DeepSpeed ZeRO-3, patched before or after its start.

The arguments are cases, "family/when/dtype"; when: "never", "before", "after", or "stages", before and with `STAGES`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from hf_checks import cast
from ranks import join, leave
from tiny_hf_families import NAMED

from fastmllm.compression import Placement, TopK
from fastmllm.hf import patch
from fastmllm.hf.rules import OPS

STEPS, RATE = 2, 0.05
STAGES = Placement(stages=((1, TopK(0.5, scorer="last_row")),))


def case(name: str, when: str, dtype: str) -> dict[str, Any]:
    """Train a model for some steps."""
    import deepspeed

    family = NAMED[name]
    model = family.build()
    report = None
    if when in ("before", "stages"):
        report = patch(model, compress=STAGES if when == "stages" else None, ops=OPS)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1000},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # its default is 1
        "bf16": {"enabled": dtype == "bfloat16"},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    if when == "after":
        report = patch(engine, ops=OPS)
    losses = []
    for _ in range(STEPS):
        loss = engine(**cast(family.batch(), getattr(torch, dtype))).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    engine.destroy()
    return {
        "losses": torch.stack(losses), "weights": weights,
        "replaced": sorted({row.op for row in report.replaced}) if report else [],
        "fallbacks": sorted(str(v) for v in report.fallbacks().values()) if report else [],
    }  # fmt: skip


def main() -> None:
    rank, world, _, cases = join()
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
        DS_ACCELERATOR="cpu",
    )
    import deepspeed  # reads the variables

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else each rank compiles it at its start, or waits
    leave({one: case(*one.split("/")) for one in cases})


if __name__ == "__main__":
    main()
