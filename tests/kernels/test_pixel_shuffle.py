"""pixel_shuffle: equal to transformers' connectors, to torch in fp64 and to its Triton form, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate, gradients, strided

from fastmllm.kernels import pixel_shuffle as op
from fastmllm.kernels.pixel_shuffle import pixel_shuffle

RAGGED = [(2, 4), (1, 6, 2), (4, 2), (4, 2), (0, 0), (2, 2)]  # 2 x 4, 6 x 2, twice 4 x 2, empty, 2 x 2
CASES = [(RAGGED, 2, 5), ([(3, 6), (9, 3)], 3, 7), ([(2, 2)], 1, 4), ([], 2, 3)]  # grids, factor, D


def _plain(x, grid, factor, order, weight=None, bias=None, eps=1e-5):
    """Reshape and normalise in plain torch, image by image."""
    images, start, r, width = [], 0, factor, x.shape[-1]
    for *t, h, w in grid:
        for _ in range(t[0] if t else 1):
            tokens = x[start : start + h * w].view(h // r, r, w // r, r, width)
            tokens = tokens.permute(2, 0, 1, 3, 4) if order == "columns" else tokens.permute(0, 2, 1, 3, 4)
            images.append(tokens.reshape(h * w // r**2, r * r * width))
            start += h * w
    y = torch.cat(images) if images else x.reshape(0, r * r * width)
    if weight is None:
        return y
    return F.layer_norm(y.reshape(-1, weight.numel()), weight.shape, weight, bias, eps).view(y.shape)


def _inputs(case, norm, dtype=torch.float32, device="cpu"):
    grid, factor, width = case
    generator = torch.Generator().manual_seed(0)
    tokens = sum((e[0] if len(e) == 3 else 1) * e[-2] * e[-1] for e in grid)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    size = {"none": 0, "token": width, "output": factor**2 * width}[norm]
    weight, bias = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    made = [x, weight + 1, bias] if size else [x, None, None]
    return [None if t is None else t.to(device, dtype) for t in made]


def _flat(grid):
    return op.join_runs([(1, *e) if len(e) == 2 else e for e in grid])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norm", ["none", "token", "output"])
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_matches_torch(case, dtype, norm, order):
    grid, factor, _ = case
    inputs = _inputs(case, norm, dtype)
    leaves = [None if t is None else strided(t).requires_grad_() for t in inputs]
    got = pixel_shuffle(leaves[0], grid, factor, order, *leaves[1:])
    seed = torch.randn(got.shape, dtype=torch.float64)
    results = [got, *gradients([got], [t for t in leaves if t is not None], [seed])]
    wanted = []
    for kind in (dtype, torch.float64):
        copies = [None if t is None else t.detach().to(kind).requires_grad_() for t in inputs]
        want = _plain(copies[0], grid, factor, order, *copies[1:])
        wanted.append([want, *gradients([want], [t for t in copies if t is not None], [seed.to(kind)])])
    for g, s, o in zip(results, *wanted, strict=True):
        if norm == "none":
            assert torch.equal(g, s)
        else:
            assert_as_accurate(g, s, o, ulps=8)


def test_equals_transformers_internvl_and_idefics3():
    internvl = pytest.importorskip("transformers.models.internvl.modeling_internvl")
    idefics3 = pytest.importorskip("transformers.models.idefics3.modeling_idefics3")
    x = torch.randn(2, 16, 6)
    shuffle = internvl.InternVLModel.pixel_shuffle
    second = shuffle(None, x.view(2, 4, 4, 6), 0.5)
    assert torch.equal(pixel_shuffle(x), second.reshape(2, 4, 24))
    # ps_version v1 leaves out the last exchange of rows and columns
    assert torch.equal(pixel_shuffle(x, order="columns"), second.transpose(1, 2).reshape(2, 4, 24))
    for scale in (2, 4):
        assert torch.equal(pixel_shuffle(x, factor=scale), idefics3.Idefics3Connector.pixel_shuffle(None, x, scale))


def test_equals_transformers_qwen_mergers():
    qwen2 = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    merger = qwen2.PatchMerger(8, 6)
    torch.nn.init.normal_(merger.ln_q.weight)
    torch.nn.init.normal_(merger.ln_q.bias)
    x = torch.randn(16, 6)
    got = pixel_shuffle(x, order="merged", weight=merger.ln_q.weight, bias=merger.ln_q.bias, eps=1e-6)
    torch.testing.assert_close(merger.mlp(got), merger(x))
    after = torch.randn(24), torch.randn(24)
    want = F.layer_norm(x.view(4, 24), (24,), *after)
    torch.testing.assert_close(pixel_shuffle(x, order="merged", weight=after[0], bias=after[1]), want)
    assert torch.equal(pixel_shuffle(x, order="merged"), x.view(4, 24))


@pytest.mark.parametrize("case", CASES[:2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["none", "token", "output"])
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_triton_matches_reference(case, dtype, norm, order, device, guard):
    grid, factor, _ = case
    inputs = _inputs(case, norm, dtype, device)
    wide = [None if t is None else t.double() for t in inputs]
    options = _flat(grid), factor, order == "columns"
    got = guard.run(op.pixel_shuffle_triton, inputs[0], *options, *inputs[1:], 1e-5)
    want = op.pixel_shuffle_reference(inputs[0], *options, *inputs[1:], 1e-5)
    truth = op.pixel_shuffle_reference(wide[0], *options, *wide[1:], 1e-5)
    for g, s, o in zip(got, want, truth, strict=True):
        assert_as_accurate(g, s, o, ulps=8)
    grad = torch.randn(want[0].shape).to(device, dtype)
    saved = (inputs[0], inputs[1], *want[1:]) if norm != "none" else (None,) * 4
    saved_wide = (wide[0], wide[1], *truth[1:]) if norm != "none" else (None,) * 4
    got = guard.run(op.pixel_shuffle_bwd_triton, grad, *saved, *options, True, True)
    want = op.pixel_shuffle_bwd_reference(grad, *saved, *options, True, True)
    truth = op.pixel_shuffle_bwd_reference(grad.double(), *saved_wide, *options, True, True)
    for g, s, o in zip(got, want, truth, strict=True):
        assert_as_accurate(g, s, o, ulps=8)


def test_triton_over_several_programs(device, guard):
    """Rows in more than one program and more than one trip, columns of the copy in more than one block."""
    case = [(2, 2, 4), (6, 2)], 2, 520
    for norm in ("none", "output"):
        x, weight, bias = _inputs(case, norm, device=device)
        want = op.pixel_shuffle_reference(x, _flat(case[0]), 2, False, weight, bias, 1e-5)
        got = guard.run(op.pixel_shuffle_triton, x, _flat(case[0]), 2, False, weight, bias, 1e-5)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    grad, args = torch.randn_like(want[0]), (x, weight, *want[1:], _flat(case[0]), 2, False, True, True)
    got = guard.run(op.pixel_shuffle_bwd_triton, grad, *args)
    torch.testing.assert_close(got, op.pixel_shuffle_bwd_reference(grad, *args), atol=1e-5, rtol=1e-5)


def test_triton_backward_of_a_stride_0_gradient(device):
    x, weight, bias = _inputs(CASES[1], "output", device=device)
    options = _flat(CASES[1][0]), 3, False
    _, mean, rstd = op.pixel_shuffle_reference(x, *options, weight, bias, 1e-5)
    for saved in ((x, weight, mean, rstd), (None,) * 4):
        grad = torch.ones((), device=device).expand(5, 63)
        got = op.pixel_shuffle_bwd_triton(grad, *saved, *options, True, True)
        want = op.pixel_shuffle_bwd_reference(grad.contiguous(), *saved, *options, True, True)
        torch.testing.assert_close(got, want, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 4), (torch.float32, op.MAX_WIDTH // 4 + 1)])
def test_what_the_kernels_do_not_take_goes_to_the_reference(dtype, width, device):
    case = [(2, 2)], 2, width
    x, weight, bias = _inputs(case, "output", dtype, device)
    got = op.pixel_shuffle_triton(x, [1, 2, 2], 2, False, weight, bias, 1e-5)
    want = op.pixel_shuffle_reference(x, [1, 2, 2], 2, False, weight, bias, 1e-5)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    args = got[0], x, weight, *got[1:], [1, 2, 2], 2, False, True, True
    torch.testing.assert_close(
        op.pixel_shuffle_bwd_triton(*args), op.pixel_shuffle_bwd_reference(*args), rtol=0, atol=0
    )


def _count_launches(monkeypatch, *kernels):
    """Record launches instead of making them."""
    launched = []
    for name in kernels:
        record = {"__getitem__": lambda self, grid, name=name: lambda *args, **options: launched.append(name)}
        monkeypatch.setattr(op, name, type("Kernel", (), record)())
    return launched


@pytest.mark.parametrize("norm", ["none", "token", "output"])
def test_one_launch_each_way_and_no_wait(norm, monkeypatch):
    """Meta tensors cannot be read: a launcher that waits for the device fails here."""
    launched = _count_launches(monkeypatch, "_copy_kernel", "_fwd_kernel", "_bwd_kernel")
    x, weight, bias = _inputs(CASES[0], norm, device="meta")
    y, mean, rstd = op.pixel_shuffle_triton(x, _flat(RAGGED), 2, True, weight, bias, 1e-5)
    saved = (x, weight, mean, rstd) if norm != "none" else (None,) * 4
    op.pixel_shuffle_bwd_triton(y, *saved, _flat(RAGGED), 2, True, True, True)
    assert launched == (["_copy_kernel"] * 2 if norm == "none" else ["_fwd_kernel", "_bwd_kernel"])


def test_an_image_does_not_depend_on_its_neighbours():
    x, weight, bias = _inputs(CASES[0], "output", torch.bfloat16)
    whole = pixel_shuffle(x, RAGGED, 2, "columns", weight, bias)
    alone = pixel_shuffle(x[8:20], [(6, 2)], 2, "columns", weight, bias)
    assert torch.equal(whole[2:5], alone)
    assert torch.equal(whole, pixel_shuffle(x, RAGGED, 2, "columns", weight, bias))


def test_batches_are_packed_grids():
    x = torch.randn(3, 8, 5)
    want = pixel_shuffle(x.view(24, 5), [(3, 4, 2)])
    assert torch.equal(pixel_shuffle(x, [(4, 2)]).view(6, 20), want)
    assert torch.equal(pixel_shuffle(x, torch.tensor([[4, 2]])).view(6, 20), want)
    assert torch.equal(pixel_shuffle(x, [(4, 2)] * 3).view(6, 20), want)
    assert pixel_shuffle(x[:0], [(4, 2)]).shape == (0, 2, 20)


def test_what_is_frozen_costs_nothing():
    x, weight, bias = _inputs(CASES[1], "output")
    options = _flat(CASES[1][0]), 3, False
    y, mean, rstd = op.pixel_shuffle_reference(x, *options, weight, bias, 1e-5)
    bwd = torch.ops.fastmllm.pixel_shuffle_bwd
    dx, dw, db = bwd(y, x, weight, mean, rstd, *options, True, False)
    assert dx.shape == x.shape
    assert dw.numel() == db.numel() == 0
    dx, dw, db = bwd(y, x, weight, mean, rstd, *options, False, True)
    assert dx.numel() == 0
    assert dw.shape == db.shape == weight.shape
    pixel_shuffle(x, CASES[1][0], 3, weight=weight.requires_grad_(), bias=bias).sum().backward()  # a frozen tower
    assert weight.grad is not None


def test_triton_leaves_out_what_is_frozen(device, guard):
    x, weight, bias = _inputs(CASES[1], "token", device=device)
    options = _flat(CASES[1][0]), 3, False
    y, mean, rstd = op.pixel_shuffle_reference(x, *options, weight, bias, 1e-5)
    want = op.pixel_shuffle_bwd_reference(y, x, weight, mean, rstd, *options, True, True)
    for kept in ((True, False), (False, True)):
        got = guard.run(op.pixel_shuffle_bwd_triton, y, x, weight, mean, rstd, *options, *kept)
        assert [bool(t.numel()) for t in got] == [kept[0], kept[1], kept[1]]
        for g, w in zip(got, want, strict=True):
            if g.numel():
                torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["none", "token", "output"])
def test_opcheck(norm):
    x, weight, bias = (None if t is None else t.requires_grad_() for t in _inputs(CASES[1], norm))
    args = (x, _flat(CASES[1][0]), 3, False, weight, bias, 1e-5)
    torch.library.opcheck(torch.ops.fastmllm.pixel_shuffle.default, args)


@pytest.mark.parametrize("order", ["rows", "merged"])
def test_compile(order):
    x, weight, bias = _inputs(([(2, 4), (4, 2)], 2, 5), "output")
    compiled = torch.compile(pixel_shuffle, fullgraph=True, backend="aot_eager")
    args = x, [(2, 4), (4, 2)], 2, order, weight, bias
    torch.testing.assert_close(compiled(*args), pixel_shuffle(*args))


@pytest.mark.parametrize("norm", ["none", "token", "output"])
def test_gradcheck(norm):
    case = [(2, 4), (4, 2)], 2, 3
    leaves = [t.requires_grad_() for t in _inputs(case, norm, torch.float64) if t is not None]
    assert torch.autograd.gradcheck(lambda x, *norm: pixel_shuffle(x, case[0], 2, "columns", *norm), leaves)


def test_rejects_what_does_not_fit():
    x = torch.zeros(8, 3)
    with pytest.raises(ValueError, match=r"pixel_shuffle: x \(8, 3\) has 8 tokens, its grids 4"):
        pixel_shuffle(x, [(2, 2)])
    with pytest.raises(ValueError, match=r"pixel_shuffle: grid \(1, 8\) is no multiple of factor 2"):
        pixel_shuffle(x, [(1, 8)])
    with pytest.raises(ValueError, match=r"pixel_shuffle: x \(8, 3\) is no batch of square grids"):
        pixel_shuffle(x)
    with pytest.raises(ValueError, match=r"pixel_shuffle: weight \(4,\).*\(3,\) or \(12,\)"):
        pixel_shuffle(x, [(2, 4)], weight=torch.ones(4))
    with pytest.raises(ValueError, match=r"pixel_shuffle: bias \(3,\).*\(12,\)"):
        pixel_shuffle(x, [(2, 4)], weight=torch.ones(12), bias=torch.ones(3))
    with pytest.raises(ValueError, match=r"pixel_shuffle: order 'v1' must be one of"):
        pixel_shuffle(x, [(2, 4)], order="v1")
    with pytest.raises(ValueError, match=r"pixel_shuffle: a grid must be \(h, w\)"):
        pixel_shuffle(x, [(1, 1, 2, 4)])
