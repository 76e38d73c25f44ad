"""position_resample: the operator equals interpolate and the checkpoints' own code, Triton equals it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from launches import Launches
from oracle import assert_as_accurate, gradients, strided

from fastmllm.kernels import position_resample as op
from fastmllm.kernels.position_resample import position_resample

# mode, align_corners, antialias
MODES = [("bilinear", False, False), ("bilinear", True, False), ("bilinear", False, True), ("bicubic", False, False),
         ("bicubic", True, False)]  # fmt: skip
# G, Q, D, grids, merge
CASES = [
    (3, 3, 5, [(5, 2), (3, 3), (1, 7)], 1),
    (4, 6, 16, [(2, 4, 2), (0, 4, 2), (1, 2, 6)], 2),
    (5, 4, 33, [(1, 1), (0, 3), (9, 8)], 1),
    (1, 1, 3, [(2, 3)], 1),
    (2, 2, 3, [], 1),
]


def _torch(table, grids, merge, mode, align_corners, antialias):
    """Interpolate for each image, in fp32 as the checkpoints' code does; reorder into merge blocks."""
    wide = table.to(torch.float64 if table.dtype == torch.float64 else torch.float32).permute(2, 0, 1)[None]
    out = [table.new_empty(0, table.shape[2])]
    for g in grids:
        t, (h, w) = g[0] if len(g) == 3 else 1, g[-2:]
        if t * h * w == 0:
            continue
        y = F.interpolate(wide, (h, w), mode=mode, align_corners=align_corners, antialias=antialias)[0]
        y = y.view(-1, h // merge, merge, w // merge, merge).permute(1, 3, 2, 4, 0).reshape(h * w, -1)
        out += [y.to(table.dtype)] * t
    return torch.cat(out)


def _options(mode):
    return {"mode": mode[0], "align_corners": mode[1], "antialias": mode[2]}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_matches_torch(case, dtype, mode):
    g, q, d, grids, merge = case
    torch.manual_seed(0)
    table = strided(torch.randn(g, q, d).to(dtype)).requires_grad_()
    wide = table.detach().double().requires_grad_()
    out = position_resample(table, grids, merge_size=merge, **_options(mode))
    same, oracle = _torch(table, grids, merge, *mode), _torch(wide, grids, merge, *mode)
    assert out.dtype == dtype
    assert_as_accurate(out, same, oracle)
    if out.numel():
        seed = torch.randn(out.shape).to(dtype)
        runs = [gradients([o], [t], [seed])[0] for o, t in ((out, table), (same, table), (oracle, wide))]
        assert_as_accurate(*runs, ulps=8)


# antialiased, a program loops over 5 x 5 entries
SHRUNK = [(3, 2, 5, [(5, 2), (2, 3)], 1), (4, 2, 16, [(2, 2, 4)], 2), (3, 4, 33, [(2, 3), (0, 3), (4, 4)], 1)]


@pytest.mark.parametrize("mode, case", [(m, c) for m in MODES for c in (SHRUNK if m[2] else CASES)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_forward_matches_reference(case, dtype, mode, device, guard):
    g, q, d, grids, merge = case
    torch.manual_seed(0)
    table = torch.randn(g, q, d).to(device, dtype)
    args = _arguments(table, grids, merge, mode)
    got = guard.run(op.position_resample_triton, table, *args)
    want = op.position_resample_reference(table, *args)
    assert_as_accurate(got, want, op.position_resample_reference(table.double(), *args))


# the backward has a program for each entry of the table
BACKWARD = [(2, 3, 5, [(3, 2), (0, 4), (1, 4)], 1), (2, 2, 33, [(2, 2, 4)], 2), (1, 3, 4, [(1, 7), (3, 5)], 1)]


@pytest.mark.parametrize("case", BACKWARD, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_triton_backward_matches_reference(case, dtype, mode, device, guard):
    g, q, d, grids, merge = case
    torch.manual_seed(0)
    rows, *rest = _arguments(torch.empty(g, q, d, device=device), grids, merge, mode)[1:]
    grids = op.grid_table(op.segments("position_resample", grids), 0, torch.device(device))
    grad = torch.randn(rows, d).to(device, dtype)
    got = guard.run(op.position_resample_bwd_triton, grad, grids, g, q, *rest)
    want = op.position_resample_bwd_reference(grad, grids, g, q, *rest)
    assert_as_accurate(got, want, op.position_resample_bwd_reference(grad.double(), grids, g, q, *rest))


def _arguments(table, grids, merge, mode):
    """Return what the public function hands to the operator behind the table."""
    found = []

    def record(_table, *args):
        found.extend(args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "_position_resample", record)
        position_resample(table, grids, merge_size=merge, **_options(mode))
    return found


def test_one_launch_each_way_and_no_wait():
    table = torch.empty(4, 5, 8, device="meta")
    grids, rows, *rest = _arguments(table, [(1, 2, 2), (2, 4, 6)], 2, MODES[0])
    with Launches(op, "_fwd_kernel", "_bwd_kernel") as launches:
        y = op.position_resample_triton(table, grids, rows, *rest)
        assert launches.take() == ["_fwd_kernel"]
        op.position_resample_bwd_triton(y, grids, 4, 5, *rest)
        assert launches.take() == ["_bwd_kernel"]


def test_triton_takes_what_is_not_contiguous_and_hands_on_fp64(device):
    table = torch.randn(2, 3, 8, device=device)
    args = _arguments(table, [(2, 2)], 1, ("bicubic", False, False))
    got = op.position_resample_triton(strided(table), *args)
    torch.testing.assert_close(got, op.position_resample_reference(table, *args))
    grad = torch.ones((), device=device).expand(4, 8)  # of `.sum().backward()`
    last = (args[0], 2, 3, *args[2:])
    got = op.position_resample_bwd_triton(grad, *last)
    torch.testing.assert_close(got, op.position_resample_bwd_reference(grad.contiguous(), *last))
    assert op.position_resample_triton(table.double(), *args).dtype == torch.float64
    assert op.position_resample_bwd_triton(grad.double(), *last).dtype == torch.float64


def test_triton_gives_each_image_what_it_gets_alone_and_the_same_twice(device):
    table = torch.randn(3, 3, 8, device=device)
    mode = ("bicubic", False, False)
    both = op.position_resample_triton(table, *_arguments(table, [(2, 5), (3, 2)], 1, mode))
    alone = op.position_resample_triton(table, *_arguments(table, [(3, 2)], 1, mode))
    assert torch.equal(both[10:], alone)
    assert torch.equal(both, op.position_resample_triton(table, *_arguments(table, [(2, 5), (3, 2)], 1, mode)))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_gradcheck(mode):
    table = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda t: position_resample(t, [(2, 4), (4, 2)], merge_size=2, **_options(mode)), [table]
    )


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_opcheck(mode):
    table = torch.randn(3, 2, 5, requires_grad=True)
    args = _arguments(table, [(2, 4), (1, 2)], 1, mode)
    torch.library.opcheck(torch.ops.fastmllm.position_resample.default, (table, *args))


def test_compile():
    table = torch.randn(3, 2, 5, requires_grad=True)

    def run(table):
        return position_resample(table, [(1, 2, 4), (1, 2, 2)], merge_size=2)

    got = torch.compile(run, fullgraph=True, backend="aot_eager")(table)
    torch.testing.assert_close(got, run(table))
    got.sum().backward()
    assert table.grad is not None


def test_a_frozen_table_costs_nothing():
    table = torch.randn(3, 3, 4)
    assert not position_resample(table, [(2, 2)]).requires_grad


@pytest.mark.parametrize("merge", [1, 2])
def test_equals_transformers(merge):
    """Taps and weights of the Qwen3-VL, Kimi and PaddleOCR families, and SigLIP2's per-image loop."""
    vision = pytest.importorskip("transformers.vision_utils")
    table, grids = torch.randn(6, 6, 8), [(1, 4, 10), (2, 8, 2)]
    for mode, align in (("bilinear", True), ("bilinear", False), ("bicubic", False)):
        taps, weights = vision.get_vision_interpolation_indices_and_weights(
            torch.tensor(grids), 6, mode=mode, align_corners=align, spatial_merge_size=merge
        )
        want = (table.flatten(0, 1)[taps] * weights[:, :, None]).sum(1)
        got = position_resample(table, torch.tensor(grids), mode=mode, align_corners=align, merge_size=merge)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_equals_siglip2():
    siglip2 = pytest.importorskip("transformers.models.siglip2.modeling_siglip2")
    table, shapes = torch.randn(6, 6, 8), [(4, 9), (3, 2)]
    want = siglip2.Siglip2VisionEmbeddings.resize_positional_embeddings(table, torch.tensor(shapes), 36)
    got = position_resample(table, shapes, mode="bilinear", antialias=True)
    torch.testing.assert_close(got, torch.cat([want[0, :36], want[1, :6]]))


def test_rejects_what_does_not_fit():
    table = torch.randn(3, 3, 4)
    for message, arguments, options in (
        (r"table must be \(G, Q, D\) floats, but it is \(9, 4\)", (table.view(9, 4), [(2, 2)]), {}),
        (r"mode='nearest'", (table, [(2, 2)]), {"mode": "nearest"}),
        (r"antialias needs bilinear", (table, [(2, 2)]), {"antialias": True}),
        (r"grids \[\(2, 3\)\] must be multiples of merge_size=2", (table, [(2, 3)]), {"merge_size": 2}),
        (r"a grid must be \(h, w\) or \(t, h, w\)", (table, [(2,)]), {}),
        (r"sizes are read on the host", (table, torch.ones(1, 3, device="meta")), {}),
    ):
        with pytest.raises(ValueError, match="fastmllm::position_resample: .*" + message):
            position_resample(*arguments, **options)
