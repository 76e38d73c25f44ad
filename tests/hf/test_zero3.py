"""Under DeepSpeed ZeRO-3, whose weights are there only while their own module runs."""

from __future__ import annotations

import pytest
import torch
from hf_checks import cast
from hf_zero3 import RATE, STAGES, STEPS
from ranks import results
from tiny_hf_families import NAMED

from fastmllm.hf import patch
from fastmllm.hf.rules import OPS

pytest.importorskip("deepspeed")
DTYPES = ("float32", "bfloat16")


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_two_ranks_learn_the_same(name, tmp_path):
    runs = results("hf_zero3.py", 2, tmp_path, *(f"{name}/{when}/float32" for when in ("never", "before", "after")))[0]
    plain = runs[f"{name}/never/float32"]
    for when in ("before", "after"):
        found = runs[f"{name}/{when}/float32"]
        torch.testing.assert_close(found["losses"], plain["losses"])
        for weight, value in plain["weights"].items():
            torch.testing.assert_close(found["weights"][weight], value, msg=weight)
        # weights that ZeRO-3 already holds cannot be read, so the one that reads its parts' is left
        assert set(found["replaced"]) >= NAMED[name].ops - ({"gelu_mlp"} if when == "after" else set())
        assert all("gelu_mlp" in why for why in found["fallbacks"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return results("hf_zero3.py", 2, tmp_path_factory.mktemp("zero3"), *(f"llava/stages/{dtype}" for dtype in DTYPES))[
        0
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_ranks_drop_tokens_between_layers_as_one_process_does(dtype, runs):
    """Of fp32 master weights, as DeepSpeed keeps them for bfloat16."""
    family, found = NAMED["llava"], runs[f"llava/stages/{dtype}"]
    model = family.build()
    masters = [p.detach().clone() for p in model.parameters()]
    model.to(getattr(torch, dtype)).train()
    whole = model(**cast(family.batch(), model.dtype)).loss.item()
    patch(model, compress=STAGES, ops=OPS)
    losses = []
    for _ in range(STEPS):
        model.zero_grad()
        losses.append(model(**cast(family.batch(), model.dtype)).loss)
        losses[-1].backward()
        with torch.no_grad():
            for p, master in zip(model.parameters(), masters, strict=True):
                p.copy_(master if p.grad is None else master.sub_(RATE * p.grad.float()))
    expected = torch.stack(losses).detach()
    near = {"rtol": 0.01, "atol": 0.0} if dtype == "bfloat16" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found["losses"], expected, **near)
    assert abs(whole / expected[0].item() - 1) > 5e-3  # without stages it is another number
    assert "compress" in found["replaced"]
    assert all("gelu_mlp" in why for why in found["fallbacks"])
    if dtype == "float32":
        for name, p in model.named_parameters():
            torch.testing.assert_close(found["weights"][name], p.detach(), msg=name)
