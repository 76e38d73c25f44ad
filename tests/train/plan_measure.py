"""Bytes that DeepSpeed holds and sends, beside the plan of `fastmllm.train.plan`; two ranks: plan_measure.py SAID."""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmllm.bench.meters import LiveBytes
from fastmllm.train.engine import Engine, EngineConfig, init_ranks
from fastmllm.train.plan import Layout, param_sizes, state_bytes
from fastmllm.train.rules import apply_rules
from fastmllm.train.traffic import collectives

BUCKET = 300_000  # elements: less than the largest weight


class Towers(nn.Module):
    """A frozen tower, a connector and layers, with weights on both sides of stage 3's threshold for small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Sequential(*(nn.Linear(384, 384) for _ in range(2)))
        self.connector = nn.Linear(384, 512)
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.LayerNorm(512), nn.Linear(512, 640), nn.Linear(640, 512)) for _ in range(3))
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.connector(self.vision(x.to(self.connector.weight.dtype)))
        return self.layers(hidden).float().square().sum()


class Started(Engine):
    """An engine that knows what the device held while its parameters came there.

    In bf16 that is all that is made meanwhile: fp32 weights stay where the host has them.
    """

    def _same_start(self, settings: dict[str, Any]) -> None:
        with LiveBytes() as live:
            super()._same_start(settings)
        self.started = live.peak


class Sent(TorchDispatchMode):
    """Payload of the collectives that run inside, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.bytes[func._opname] += max(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


def held(tensors: Iterable[Any]) -> int:
    storages = [t.untyped_storage() for t in tensors if isinstance(t, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def alive() -> dict[int, int]:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu"]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def gradients(engine: Engine) -> list[Any]:
    optimizer = engine._engine.optimizer
    if engine.config.zero_stage == 3:
        return [optimizer.grad_partitions_flat_buffer]
    shares = [t for part in getattr(optimizer, "averaged_gradients", {}).values() for t in part or ()]
    shares += [t for part in getattr(optimizer, "all_grad_tensors", {}).values() for t in part or ()]
    return shares + [param.grad for param in engine.model.parameters()]


def measure(*case: Any) -> dict[str, Any]:
    """Take two steps; return measured and planned bytes of the second, by name."""
    init_ranks()
    gc.collect()
    frozen = gc.get_freeze_count()  # by `forks`, for good
    gc.freeze()  # DeepSpeed collects garbage often, and `alive` walks over all objects: of this case only
    try:
        return _measure(*case)
    finally:
        if not frozen:
            gc.unfreeze()


def _measure(zero_stage: int, dtype: str, frozen: bool, offload: str, accumulation: int) -> dict[str, Any]:
    before = alive()
    torch.manual_seed(0)
    model = Towers()
    rules = {"connector.*": 1e-3, "layers.*": 1e-3} | ({} if frozen else {"vision.*": 1e-4})
    groups = apply_rules(model, rules, weight_decay=0.1)
    config = EngineConfig(
        zero_stage=zero_stage, dtype=dtype, offload=offload, accumulation=accumulation, bucket_elements=BUCKET
    )
    params = param_sizes(model, groups, dtype)
    engine = Started(model, groups, config, clip=1.0)
    layout = Layout(engine=config, ranks=engine.world_size)
    batch = torch.randn(1, 384)
    for _ in range(2):
        backward, sent = 0, Sent()
        for micro in range(accumulation):
            with sent:
                loss = engine.loss_sum(batch)
                held_before = held(gradients(engine))
                with LiveBytes() as live:
                    engine.backward(loss)
            del loss
            backward = max(backward, held_before + live.peak)
            found = gradients(engine)
            if micro == accumulation - 1:
                kept = held(found)
            del found
            with LiveBytes() as live, sent:
                engine.step()
    plan = state_bytes(params, layout)
    optimizer = engine._engine.optimizer
    masters = [
        getattr(optimizer, name, []) for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
    ]
    whole = [t for p in model.parameters() for t in (p.data if p.numel() > 1 else None, getattr(p, "ds_tensor", None))]
    measured = {
        "parameters": held(whole),
        "masters": held(t for part in masters for t in part),
        "moments": held(t for state in engine.optimizer.state.values() for t in state.values()),
        "gradients": kept,
        "backward": backward + (BUCKET * params[0].itemsize if zero_stage == 3 else 0),
        "update": kept + live.peak + (BUCKET * params[0].itemsize if zero_stage == 3 else 0),
    }
    planned = {
        name: getattr(plan, name) for name in ("parameters", "masters", "moments", "gradients", "backward", "update")
    }
    if dtype == "bfloat16":
        measured["start"], planned["start"] = engine.started, plan.start
    # after the step, gradients live on at stage 3 only, with the bucket; under offload, in host memory
    left = BUCKET * params[0].itemsize + plan.gradients if zero_stage == 3 else 0
    if offload == "cpu":  # here, host and device are one
        left = plan.update
        for part in (measured, planned):
            for name in ("masters", "moments", "gradients", "backward", "update"):
                del part[name]
    measured["alive"] = sum(size for key, size in alive().items() if key not in before)
    planned["alive"] = plan.parameters + plan.masters + plan.moments + plan.host + left
    sums: Counter[str] = Counter()
    for item in collectives(params, layout, backward_elements=0):
        sums[item.kind] += item.payload
    rank = engine.rank
    engine.close()
    case = f"z{zero_stage} {dtype} {'frozen' if frozen else 'whole'} {offload} x{accumulation} of {layout.ranks}"
    return {"case": case, "rank": rank, "measured": measured, "planned": planned, "sent": sent.bytes, "to_send": sums}


CASES = [
    (stage, dtype, True, "none", 1 if dtype == "float32" else 2)
    for stage, dtype in product((0, 1, 2, 3), ("float32", "bfloat16"))
    if (stage, dtype) != (0, "bfloat16")
] + [(3, "bfloat16", False, "none", 1), (2, "bfloat16", True, "cpu", 1), (3, "float32", True, "cpu", 1)]  # fmt: skip


def ranks(rank: int) -> None:
    for case in CASES:
        print(json.dumps(measure(*case)), flush=True)


if __name__ == "__main__":
    import forks

    forks.run(2, ranks, Path(sys.argv[1]), limit_s=200)
