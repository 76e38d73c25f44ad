"""What a tower derives from its grids: one read of the device a forward, none in a layer, and nothing twice."""

from __future__ import annotations

import pytest
import torch
from tiny_hf_qwen import pixels, qwen2_5_vl, qwen2_vl, qwen3_vl
from torch.overrides import TorchFunctionMode

from fastmllm.hf import patch, unpatch
from fastmllm.hf.fused import tower_grids

GRIDS = torch.tensor([[1, 6, 10], [2, 4, 4], [1, 2, 6]])
KEYWORDS = {"position_ids", "cu_seqlens", "max_seqlen"}
WINDOWS, TAPS = {"window_index", "cu_window_seqlens", "max_window_seqlen"}, {"interp_indices", "interp_weights"}


class Reads(TorchFunctionMode):
    """Count what copies to the host; on a GPU each would wait for it."""

    def __init__(self):
        super().__init__()
        self.of: list[torch.Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("cpu", "tolist", "item", "__int__", "__bool__", "__index__"):
            self.of.append(args[0])
        out = function(*args, **(kwargs or {}))
        return out.clone() if args and out is args[0] else out  # as from another device


@pytest.fixture(params=[qwen2_vl, qwen2_5_vl, qwen3_vl], ids=lambda b: b.__name__)
def tower(request):
    return request.param().model.visual


def test_nothing_is_read_after_the_grids(tower):
    """The tower runs on the meta device, which holds no values: a read of anything but the grids would raise."""
    patch(tower, ops=["attention", "patch_embed"])
    tower.to("meta")
    x = pixels(GRIDS.tolist(), 1).to("meta")
    with torch.no_grad(), Reads() as reads:
        out = tower(x, GRIDS)
    assert out.pooler_output.shape == (int(GRIDS.prod(1).sum()) // 4, 48)
    assert sum(t is GRIDS for t in reads.of) == 1
    assert not any(t.is_meta for t in reads.of)


def test_it_hands_on_what_the_tower_would_derive(tower):
    x = pixels(GRIDS.tolist(), 1)
    with torch.no_grad():
        expected = tower(x, GRIDS)
        patch(tower, ops=["attention"])
        found = tower(x, GRIDS)
        made = keywords(tower, x)
        more = WINDOWS if hasattr(tower, "window_size") else TAPS if hasattr(tower, "pos_embed") else set()
        assert set(made) == KEYWORDS | more
        assert made["max_seqlen"] == 60
        unpatch(tower)
        again = tower(x, GRIDS, **made)  # transformers' own code, given these
    for name in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(found[name], expected[name])
        assert torch.equal(again[name], expected[name])


def keywords(tower, x, **given):
    """Return the keywords that the tower's own forward is called with."""
    seen = {}
    tower_grids.TowerGrids.forward(tower, lambda *args, **kwargs: seen.update(kwargs), x, GRIDS, **given)
    return seen


def test_what_a_caller_gives_stays_and_needs_no_read(tower):
    x = pixels(GRIDS.tolist(), 1)
    made = keywords(tower, x)
    with Reads() as reads:
        kept = keywords(tower, x, **made)
    assert not reads.of
    assert all(kept[name] is made[name] for name in made)
    mine = torch.zeros_like(made["position_ids"])
    assert keywords(tower, x, position_ids=mine)["position_ids"] is mine


def test_grids_that_are_no_tensor_run_transformers(tower):
    report = patch(tower, ops=["attention"])
    with pytest.raises((TypeError, AttributeError)):
        tower(pixels(GRIDS.tolist(), 1), GRIDS.tolist())
    assert list(report.fallbacks()) == [""]


def test_a_transformers_without_the_functions_is_left(tower, monkeypatch):
    assert tower_grids.TowerGrids.refuses(tower) is None
    monkeypatch.setattr(tower_grids, "_MODULE", "transformers.nowhere")
    assert "get_vision_cu_seqlens" in tower_grids.TowerGrids.refuses(tower)
