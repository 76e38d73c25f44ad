"""_runs: tables of the host reach the device from pinned memory, once, and outlive the CUDA graphs that read them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from fastmllm.kernels import _grids, _rope_tables, _runs, _splice_plan
from fastmllm.kernels.splice_tokens import splice_plan

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def capturing(monkeypatch):
    """Play the GPU: copies stay on the CPU, and the test says when a graph is captured."""
    state = {"capturing": False, "copies": 0}

    def copy(tensor, device):
        state["copies"] += 1
        return tensor.clone()

    monkeypatch.setattr(_runs, "_kept", type(_runs._kept)())
    monkeypatch.setattr(_runs, "_captured", {})
    monkeypatch.setattr(_runs, "to_device", copy)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    return state


def _fill():
    """Upload so many other tables that nothing old is kept for its own sake."""
    for i in range(_runs.KEPT):
        _runs._upload((i, -1), CUDA, 0)
    gc.collect()


def test_a_table_is_uploaded_once_and_the_old_are_freed(capturing):
    table = weakref.ref(_runs._upload((1, 2), CUDA, 0))
    assert _runs._upload((1, 2), CUDA, 0) is table()
    assert capturing["copies"] == 1
    assert _runs._upload((1, 2), CUDA, 7) is not table(), "another stream would not wait for the copy"
    _fill()
    assert table() is None


def test_a_graph_keeps_its_tables(capturing):
    """A replay reads an address: the table stays there, whatever is uploaded afterwards."""
    table = weakref.ref(_runs._upload((1, 2), CUDA, 0))
    capturing["capturing"] = True
    for stream in (0, 7):  # torch.cuda.graph captures on a stream of its own
        assert _runs._upload((1, 2), CUDA, stream) is table()
    capturing["capturing"] = False
    _fill()
    assert table() is not None
    assert table().tolist() == [1, 2]
    capturing["capturing"] = True  # a second graph, after the table left the cache of eager calls
    assert _runs._upload((1, 2), CUDA, 7) is table()


def test_a_capture_says_what_it_lacks(capturing):
    capturing["capturing"] = True
    with pytest.raises(RuntimeError, match="run the call once before"):
        _runs._upload((1, 2), CUDA, 0)
    assert capturing["copies"] == 0


def test_a_table_of_inference_serves_training(capturing):
    with torch.inference_mode():
        table = _runs._upload((1, 2), CUDA, 0)
    assert not table.is_inference()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA graphs")
def test_replays_read_what_was_captured():
    x = torch.zeros(2, device=CUDA)
    _runs.upload((3, 4), x.device)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x + _runs.upload((3, 4), x.device)
    for i in range(2 * _runs.KEPT):
        _runs.upload((i, -1), x.device)
    graph.replay()
    assert y.tolist() == [3, 4]
    with pytest.raises(RuntimeError, match="inside of a CUDA graph capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        _runs.to_device(torch.zeros(2), x.device)


def test_every_table_comes_the_same_way(monkeypatch):
    """Grids, positions and plans make no pageable copy of their own."""
    uploaded, moved = [], []
    monkeypatch.setattr(_grids, "upload", lambda v, d: uploaded.append(d) or torch.tensor(v, dtype=torch.int32))
    monkeypatch.setattr(_rope_tables, "upload", lambda v, d: uploaded.append(d) or torch.tensor(v, dtype=torch.int32))
    monkeypatch.setattr(_splice_plan, "to_device", lambda t, d: moved.append(d) or t)
    assert _grids.grid_table([(2, 3), (1, 1)], 1, CUDA).tolist() == [[0, 6, 7], [2, 1, 0], [3, 1, 0], [0, 7, 9]]
    places = _rope_tables.grid_positions([(1, 1, 2), (2, 1, 1)], device=CPU)
    assert places.dtype == torch.int64
    assert places.tolist() == [[0, 0], [0, 1], [0, 0], [0, 0]]
    assert uploaded == [CUDA, CPU]
    plan = splice_plan([5, 9], [0, 2], [[2]], placeholder=9)
    plan.to("cuda:0")
    assert len(moved) == sum(isinstance(getattr(plan, name), torch.Tensor) for name in plan.__slots__)


def test_to_device_pins(monkeypatch):
    class Host(torch.Tensor):
        pinned = 0

        def pin_memory(self):
            Host.pinned += 1
            return self

        def to(self, *_, **options):
            return options

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tensor = torch.zeros(2).as_subclass(Host)
    assert _runs.to_device(tensor, "cuda:0") == {"non_blocking": True}
    assert Host.pinned == 1
    _runs.to_device(tensor, "cpu")
    assert Host.pinned == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"tensor \(2,\) of the host inside of a CUDA graph capture"):
        _runs.to_device(tensor, "cuda:0")
