"""token_pool: equal to torch's pooling and interpolation image by image, and to its Triton form, in both directions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate, gradients, strided

from fastmllm.kernels import token_pool as op
from fastmllm.kernels.token_pool import token_pool

GRIDS = [(5, 7), (2, 3, 4), (4, 4), (1, 6)]  # of which the second has two frames
SIZES = [(2, 3), (2, 2), (4, 4), (3, 4)]  # fewer, fewer, as many, more
CASES = {  # mode, size, kernel_size
    "adaptive": ("average", SIZES, None),
    "bilinear": ("bilinear", SIZES, None),
    "one size": ("bilinear", (3, 2), None),
}
PASSES = (  # forward, backward
    (op.token_pool_triton, op.token_pool_reference),
    (op.token_pool_bwd_triton, op.token_pool_bwd_reference),
)


def _tokens(grid):
    return sum(math.prod(e) for e in grid)


def _inputs(grid=GRIDS, width=5, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_tokens(grid), width, generator=generator, dtype=torch.float64).to(device, dtype)


def _plain(x, grid, mode, size, kernel_size=None):
    """Pool each image in plain torch."""
    images, start = [], 0
    sizes = size if size and not isinstance(size[0], int) else [size] * len(grid)
    for (*t, h, w), target in zip(grid, sizes, strict=True):
        end = start + math.prod(t) * h * w
        image = x[start:end].view(math.prod(t), h, w, -1).permute(0, 3, 1, 2)
        start = end
        if mode == "bilinear":
            image = F.interpolate(image, target, mode="bilinear", align_corners=False)
        else:
            image = F.avg_pool2d(image, kernel_size) if kernel_size else F.adaptive_avg_pool2d(image, target)
        images.append(image.permute(0, 2, 3, 1).reshape(-1, x.shape[1]))
    return torch.cat(images) if images else x


def _check_against_torch(x, dtype, grid, mode, size, kernel_size=None):
    leaf = strided(x).requires_grad_()
    got = token_pool(leaf, grid, size=size, kernel_size=kernel_size, mode=mode)
    seed = torch.randn(got.shape, dtype=torch.float64)
    wanted = []
    for kind in (dtype, torch.float64):
        copy = x.detach().to(kind).requires_grad_()
        want = _plain(copy, grid, mode, size, kernel_size)
        wanted.append([want, *gradients([want], [copy], [seed.to(kind)])])
    for g, s, o in zip([got, *gradients([got], [leaf], [seed])], *wanted, strict=True):
        assert_as_accurate(g, s, o, ulps=8)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_matches_torch(case, dtype):
    mode, size, kernel_size = CASES[case]
    _check_against_torch(_inputs(dtype=dtype), dtype, GRIDS, mode, size, kernel_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_matches_avg_pool2d(dtype):
    grid = [(5, 7), (2, 3, 4), (4, 4)]
    _check_against_torch(_inputs(grid, dtype=dtype), dtype, grid, "average", None, 2)


def test_equals_transformers_llava_onevision():
    model = pytest.importorskip("transformers.models.llava_onevision.modeling_llava_onevision")
    vision = type("Vision", (), {"image_size": 35, "patch_size": 5})
    holder = type("Model", (), {"config": type("Config", (), {"vision_config": vision})})
    frames = torch.randn(2, 49, 6)
    want = model.LlavaOnevisionModel.apply_pooling(holder, frames)
    torch.testing.assert_close(token_pool(frames, size=(4, 4), mode="bilinear"), want)


def _flat(grid, size, kernel=None):
    images = [(1, *e) if len(e) == 2 else e for e in grid]
    return op.join_runs([i + t for i, t in zip(images, op._targets(images, size, kernel), strict=True)])


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("case", [*CASES, "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_matches_reference(case, dtype, backward, device, guard):
    mode, size, kernel = CASES.get(case, ("average", None, 2))
    grid = GRIDS if case in CASES else GRIDS[:3]
    runs, options = _flat(grid, size, kernel), (mode == "bilinear", kernel or 0)
    launcher, reference = PASSES[backward]
    x = torch.randn(op._sizes(runs)[backward], 5, dtype=torch.float64).to(device, dtype)
    got = guard.run(launcher, x, runs, *options)
    assert_as_accurate(got, reference(x, runs, *options), reference(x.double(), runs, *options), ulps=8)


@pytest.mark.parametrize("backward", [False, True])
def test_triton_over_several_programs(backward, device, guard):
    """More tokens than one program writes and more channels than one block has."""
    runs = _flat([(2, 3), (2, 2)], [(3, 2), (2, 1)])
    x = _inputs([(3, 2), (2, 1)] if backward else [(2, 3), (2, 2)], 260, device=device)
    launcher, reference = PASSES[backward]
    torch.testing.assert_close(guard.run(launcher, x, runs, True, 0), reference(x, runs, True, 0))


@pytest.mark.parametrize("bilinear", [False, True])
def test_the_kernels_weights_are_torchs(bilinear, device):
    """The integer formulas for every pair of extents: a row of the identity reads the weights off."""
    for e, n in ((1, 1), (1, 4), (5, 1), (9, 5), (3, 8), (7, 7), (16, 3)):
        x = torch.eye(e, device=device)
        runs = [1, e, 1, n, 1]
        torch.testing.assert_close(
            op.token_pool_triton(x, runs, bilinear, 0), op.token_pool_reference(x.double(), runs, bilinear, 0).float()
        )


@pytest.mark.parametrize("bilinear", [False, True])
def test_the_kernels_backward_finds_every_output(bilinear, device):
    for e, n in ((1, 4), (5, 1), (9, 5), (3, 8), (16, 3)):
        grad, runs = torch.eye(n, device=device), [1, 1, e, 1, n]
        torch.testing.assert_close(
            op.token_pool_bwd_triton(grad, runs, bilinear, 0),
            op.token_pool_bwd_reference(grad.double(), runs, bilinear, 0).float(),
        )


def test_triton_backward_of_a_stride_0_gradient(device):
    runs = _flat(GRIDS, SIZES)
    grad = torch.ones((), device=device).expand(op._sizes(runs)[1], 5)
    got = op.token_pool_bwd_triton(grad, runs, True, 0)
    torch.testing.assert_close(got, op.token_pool_bwd_reference(grad.contiguous(), runs, True, 0))


def test_fp64_goes_to_the_reference(device):
    runs, x = _flat(GRIDS, SIZES), _inputs(dtype=torch.float64, device=device)
    y = op.token_pool_triton(x, runs, True, 0)
    assert torch.equal(y, op.token_pool_reference(x, runs, True, 0))
    assert torch.equal(op.token_pool_bwd_triton(y, runs, True, 0), op.token_pool_bwd_reference(y, runs, True, 0))


def _count_launches(monkeypatch, *kernels):
    """Record launches instead of making them."""
    launched = []
    for name in kernels:
        record = {"__getitem__": lambda self, grid, name=name: lambda *args, **options: launched.append(name)}
        monkeypatch.setattr(op, name, type("Kernel", (), record)())
    return launched


def test_one_launch_each_way_and_no_wait(monkeypatch):
    """Meta tensors cannot be read: a launcher that waits for the device fails here."""
    launched, runs = _count_launches(monkeypatch, "_pool_kernel"), _flat(GRIDS, SIZES)
    y = op.token_pool_triton(_inputs(device="meta"), runs, True, 0)
    op.token_pool_bwd_triton(y, runs, True, 0)
    assert launched == ["_pool_kernel"] * 2


def test_an_image_does_not_depend_on_its_neighbours():
    x = _inputs(dtype=torch.bfloat16)
    whole = token_pool(x, GRIDS, size=SIZES)
    alone = token_pool(x[35:59], GRIDS[1:2], size=SIZES[1])
    assert torch.equal(whole[6:14], alone)
    assert torch.equal(whole, token_pool(x, GRIDS, size=SIZES))


def test_batches_are_packed_grids():
    x = torch.randn(3, 12, 5)
    want = token_pool(x.view(36, 5), [(3, 4, 3)], size=(2, 2))
    assert torch.equal(token_pool(x, [(4, 3)], size=(2, 2)).view(12, 5), want)
    assert torch.equal(token_pool(x, torch.tensor([[4, 3]]), size=(2, 2)).view(12, 5), want)
    assert token_pool(x[:0], [(4, 3)], size=(2, 2)).shape == (0, 4, 5)
    assert token_pool(x[0, :0], [], size=(2, 2)).shape == (0, 5)
    assert token_pool(torch.randn(2, 9, 5), size=(2, 3)).shape == (2, 6, 5)


def test_opcheck():
    x, runs = _inputs().requires_grad_(), _flat(GRIDS, SIZES)
    for bilinear in (False, True):
        torch.library.opcheck(torch.ops.fastmllm.token_pool.default, (x, runs, bilinear, 0))


@pytest.mark.parametrize("case", CASES)
def test_compile(case):
    mode, size, _ = CASES[case]
    compiled = torch.compile(token_pool, fullgraph=True, backend="aot_eager")
    x = _inputs()
    torch.testing.assert_close(
        compiled(x, GRIDS, size=size, mode=mode), token_pool(x, GRIDS, size=size, mode=mode)
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    mode, size, _ = CASES[case]
    x = _inputs(width=2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: token_pool(t, GRIDS, size=size, mode=mode), x)


def test_rejects_what_does_not_fit():
    x = torch.zeros(12, 3)
    with pytest.raises(ValueError, match=r"token_pool: x \(12, 3\) has 12 tokens, its grids 9"):
        token_pool(x, [(3, 3)], size=(2, 2))
    with pytest.raises(ValueError, match=r"token_pool: targets \[\(2, 0\)\] must be one positive"):
        token_pool(x, [(3, 4)], size=(2, 0))
    with pytest.raises(ValueError, match=r"token_pool: targets .* for each of"):
        token_pool(x, [(3, 4)], size=[(2, 2), (1, 1)])
    with pytest.raises(ValueError, match=r"token_pool: mode 'bilinear' with size None and kernel_size 2"):
        token_pool(x, [(3, 4)], kernel_size=2, mode="bilinear")
    with pytest.raises(ValueError, match=r"token_pool: mode 'nearest' must be one of"):
        token_pool(x, [(3, 4)], size=(2, 2), mode="nearest")
    with pytest.raises(ValueError, match=r"token_pool: x \(2, 4, 3\) is a batch, but its targets differ"):
        token_pool(x[:8].view(2, 4, 3), [(2, 2), (4, 1)], size=[(1, 2), (2, 1)])
