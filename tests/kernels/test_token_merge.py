"""token_merge: equal to a transcription of the algorithm, and to its Triton and C++ forms; gradients; order kept."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_as_accurate, strided

from fastmllm.kernels import token_merge as op
from fastmllm.kernels.token_merge import token_merge

SHAPES = [(2, 7, 5, 3, 2), (1, 16, 33, 40, 8), (3, 2, 4, 4, 1), (0, 6, 4, 4, 2)]  # I, N, D, M, r


def _inputs(shape, dtype=torch.float32, device="cpu"):
    images, n, width, metric_width, r = shape
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(images, n, width, generator=generator, dtype=torch.float64)
    # a metric that bf16 holds exactly: every implementation must find the same pairs
    metric = torch.randint(-8, 8, (images, n, metric_width), generator=generator).double()
    size = torch.randint(1, 5, (images, n), generator=generator).double()
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    return x.to(device, dtype), metric.to(device, dtype), size.to(device, stats), r


def _published(x, metric, size, r):
    """Transcribe Appendix D of the paper in fp64 loops, then restore the order of the tokens."""
    x, metric, size = x.double(), metric.double(), size.double()
    n = x.shape[1]
    outputs, sizes = [], []
    for xi, mi, si in zip(x, metric, size, strict=True):
        unit = mi / mi.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        scores = unit[::2] @ unit[1::2].T
        best, node = scores.max(-1)
        merged = sorted(range(len(best)), key=lambda a: (-best[a].item(), a))[:r]
        total, weight = xi * si[:, None], si.clone()
        for a in merged:
            b = 2 * int(node[a]) + 1
            total[b] += xi[2 * a] * si[2 * a]
            weight[b] += si[2 * a]
        kept = [t for t in range(n) if not (t % 2 == 0 and t // 2 in merged)]
        outputs.append(total[kept] / weight[kept, None])
        sizes.append(weight[kept])
    empty = x.new_zeros(0, n - r, x.shape[2])
    return (torch.stack(outputs), torch.stack(sizes)) if outputs else (empty, empty[..., 0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_matches_the_published_algorithm(shape, dtype):
    x, metric, size, r = _inputs(shape, dtype)
    x = strided(x).requires_grad_()
    got, got_size = token_merge(x, strided(metric), size, r)
    want, want_size = _published(x.detach(), metric, size, r)
    assert_as_accurate(got, want.to(dtype), want)
    torch.testing.assert_close(got_size.double(), want_size)
    wide = x.detach().double().requires_grad_()
    expected, _ = token_merge(wide, metric.double(), size.double(), r)
    seed = torch.randn_like(expected)
    (dx,) = torch.autograd.grad(got, x, seed.to(dtype))
    (want_dx,) = torch.autograd.grad(expected, wide, seed)
    assert_as_accurate(dx, want_dx.to(dtype), want_dx, ulps=8)


def test_weight_is_conserved():
    x, metric, size, r = _inputs((2, 16, 8, 8, 8), torch.float64)
    merged, new_size = token_merge(x, metric, size, r)
    torch.testing.assert_close((merged * new_size[..., None]).sum(1), (x * size[..., None]).sum(1))
    torch.testing.assert_close(new_size.sum(1), size.sum(1))


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_matches_reference(shape, dtype, device, guard):
    x, metric, size, r = _inputs(shape, dtype, device=device)
    best, index = guard.run(op.match_triton, metric)
    want_best, want_index = op._match_reference(metric)
    torch.testing.assert_close(best, want_best, atol=1e-5, rtol=1e-5)
    destination = op._plan(want_best, want_index, x.shape[1], r)
    assert torch.equal(op._plan(best, index.long(), x.shape[1], r), destination)
    merged, new_size = guard.run(op.merge_triton, x, size, destination, r)
    want, want_size = op._merge_reference(x, size, destination, r)
    wide, _ = op._merge_reference(x.double(), size.double(), destination, r)
    assert_as_accurate(merged, want, wide, ulps=8)
    torch.testing.assert_close(new_size, want_size)
    grad = torch.randn(want.shape).to(device, dtype)
    got = guard.run(op.token_merge_bwd_triton, grad, size, new_size, destination)
    want = op.token_merge_bwd_reference(grad, size, want_size, destination)
    wide = op.token_merge_bwd_reference(grad.double(), size.double(), want_size.double(), destination)
    assert_as_accurate(got, want, wide, ulps=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_matches_across_blocks(dtype, device, guard):
    _, metric, _, _ = _inputs((2, 201, 1, 70, 1), dtype, device)  # two blocks of A, of B and of channels
    best, index = guard.run(op.match_triton, metric)
    want, want_index = op._match_reference(metric)
    torch.testing.assert_close(best, want, atol=1e-5, rtol=1e-5)
    assert (index == want_index).float().mean() > 0.98  # sums in another order may swap equal pairs
    unit = torch.nn.functional.normalize(metric.float(), dim=-1)
    named = (unit[:, ::2] * unit[:, 1::2].gather(1, index.long().unsqueeze(-1).expand(-1, -1, 70))).sum(-1)
    torch.testing.assert_close(named, want, atol=1e-5, rtol=1e-5)


def test_fp64_goes_to_the_reference(device):
    inputs = _inputs((2, 7, 5, 3, 2), torch.float64, device)
    got, want = op.token_merge_triton(*inputs), op.token_merge_reference(*inputs)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
    grad, (_, _, size, _) = torch.randn_like(got[0]), inputs
    got, want = (f(grad, size, *want[1:]) for f in (op.token_merge_bwd_triton, op.token_merge_bwd_reference))
    assert torch.equal(got, want)


def test_triton_backward_of_a_stride_0_gradient(device):
    x, metric, size, r = _inputs((2, 7, 5, 3, 2), device=device)
    _, new_size, destination = op.token_merge_reference(x, metric, size, r)
    grad = torch.ones((), device=device).expand(2, 5, 5)
    got = op.token_merge_bwd_triton(grad, size, new_size, destination)
    torch.testing.assert_close(got, op.token_merge_bwd_reference(grad.contiguous(), size, new_size, destination))


@pytest.mark.parametrize("shape", [*SHAPES[:3], (2, 577, 24, 64, 16), (1, 130, 130, 70, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_matches_reference(shape, dtype):
    from fastmllm.kernels import _native

    if _native.EXTENSION_MISSING:
        pytest.skip(_native.EXTENSION_MISSING)
    x, metric, size, r = _inputs(shape, dtype)
    x, metric = strided(x), strided(metric)
    merged, new_size, destination = torch.ops.fastmllm.token_merge(x, metric, size, r)
    want, want_size, want_destination = op.token_merge_reference(x, metric, size, r)
    assert (destination == want_destination).float().mean() > 0.99  # sums in another order may swap equal pairs
    want, want_size = op._merge_reference(x, size, destination, r)
    wide, _ = op._merge_reference(x.double(), size.double(), destination, r)
    assert_as_accurate(merged, want, wide, ulps=8)
    torch.testing.assert_close(new_size, want_size)


def test_opcheck():
    x, metric, size, r = _inputs((2, 6, 4, 3, 2))
    torch.library.opcheck(torch.ops.fastmllm.token_merge.default, (x.requires_grad_(), metric, size, r))


def test_compile():
    x, metric, size, r = _inputs((2, 6, 4, 3, 2))
    compiled = torch.compile(token_merge, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x, metric, size, r), token_merge(x, metric, size, r), strict=True):
        torch.testing.assert_close(got, want)


def test_gradcheck():
    x, metric, size, r = _inputs((2, 5, 3, 4, 2), torch.float64)
    assert torch.autograd.gradcheck(lambda t: token_merge(t, metric, size, r)[0], x.requires_grad_())


def test_nothing_to_merge_is_the_identity():
    x = torch.randn(1, 5, 3)
    merged, size = token_merge(x, x, None, 0)
    assert merged is x
    assert size.tolist() == [[1.0] * 5]


def test_rejects_what_does_not_fit():
    x = torch.randn(1, 5, 3)
    with pytest.raises(ValueError, match=r"token_merge: x \(1, 5, 3\), metric \(1, 4, 3\)"):
        token_merge(x, x[:, :4], None, 1)
    with pytest.raises(ValueError, match=r"token_merge: size \(1, 4\)"):
        token_merge(x, x, torch.ones(1, 4), 1)
    with pytest.raises(ValueError, match=r"token_merge: r 3 must lie in 0\.\.2 for 5 tokens"):
        token_merge(x, x, None, 3)
