"""What each rank runs for tests/hf/test_zero3.py: steps under DeepSpeed ZeRO-3, patched before or after its start."""

from __future__ import annotations

import os

import torch
from hf_checks import cast
from ranks import join, leave
from tiny_hf_families import NAMED

from fastmllm.hf import patch
from fastmllm.hf.rules import OPS

rank, world, folder, (name, when) = join()
os.environ.update(
    RANK=str(rank),
    WORLD_SIZE=str(world),
    LOCAL_RANK="0",
    MASTER_ADDR="127.0.0.1",
    MASTER_PORT="0",
    DS_ACCELERATOR="cpu",
)
import deepspeed  # noqa: E402  (reads the variables)

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else each rank compiles it at its start, or waits

family = NAMED[name]
model = family.build()
report = patch(model, ops=OPS) if when == "before" else None
config = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1000},
    "zero_allow_untested_optimizer": True,
}
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
if when == "after":
    report = patch(engine, ops=OPS)
losses = []
for _ in range(3):
    loss = engine(**cast(family.batch(), torch.float32)).loss
    engine.backward(loss)
    engine.step()
    losses.append(loss.detach())
with deepspeed.zero.GatheredParameters(list(model.parameters())):
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
leave(
    {
        "losses": torch.stack(losses), "weights": weights,
        "replaced": sorted({row.op for row in report.replaced}) if report else [],
        "fallbacks": sorted(str(v) for v in report.fallbacks().values()) if report else [],
    }
)  # fmt: skip
