"""rms_norm: the operator equals torch, Triton and native code equal it, autograd and the dispatcher hold."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from launches import Launches
from oracle import assert_as_accurate, gradients, strided

from fastmllm.kernels import _native, _norm
from fastmllm.kernels import rms_norm as op
from fastmllm.kernels._norm import MAX_SCALED_WIDTH, MAX_WIDTH
from fastmllm.kernels.rms_norm import rms_norm

CSRC = Path(__file__).parents[2] / "csrc"
SHAPES = [(3, 5, 33), (7, 64), (1, 3), (0, 16)]
SETTINGS = 1e-6, 1.0  # eps and offset: Gemma's
ADDED = ["plain", "residual", "scale"]  # x, residual + x, residual + scale * x


def _inputs(shape, dtype, added, device="cpu"):
    """Return x, weight, residual, scale."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    r = torch.randn(shape, dtype=torch.float64) if added != "plain" else None
    w, s = (torch.randn(shape[-1], dtype=torch.float64) + offset for offset in (1, 0.5))
    return [None if t is None else t.to(device, dtype) for t in (x, w, r, s if added == "scale" else None)]


def _torch(x, w, r, s, offset=0.0):
    h = x if s is None else s * x
    h = h if r is None else h + r
    return F.rms_norm(h, w.shape, offset + w, 1e-6), h


def _ours(x, w, r, s, offset=0.0):
    out = rms_norm(x, w, r, scale=s, offset=offset)
    return out if r is not None else (out,)


def _wide(tensors):
    return [t.double() if isinstance(t, torch.Tensor) else t for t in tensors]


def _gradients(outputs, leaves, seeds):
    """Return one gradient or None for each leaf or None."""
    grads = iter(gradients(outputs, [t for t in leaves if t is not None], seeds[: len(outputs)]))
    return [None if t is None else next(grads) for t in leaves]


def _assert_all_as_accurate(got, same_dtype, oracle):
    for g, s, o in zip(got, same_dtype, oracle, strict=True):
        if o is not None:
            assert_as_accurate(g, s, o, ulps=8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_matches_torch(shape, dtype, added, offset):
    inputs = _inputs(shape, dtype, added)
    seeds = [torch.randn(shape), torch.randn(shape)]

    def run(function, tensors):
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        outputs = function(*leaves, offset)[: 1 if leaves[2] is None else 2]
        return [*outputs, *_gradients(outputs, leaves, seeds)]

    awkward = [None if t is None else strided(t) for t in inputs]
    _assert_all_as_accurate(run(_ours, awkward), run(_torch, inputs), run(_torch, _wide(inputs)))


def test_equals_the_modules_of_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRMSNorm
    qwen = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl").Qwen2_5_VLRMSNorm
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3").Gemma3RMSNorm
    x = torch.randn(5, 24)
    for module, offset in ((llama(24, eps=1e-5), 0.0), (qwen(24, eps=1e-5), 0.0), (gemma(24, eps=1e-5), 1.0)):
        torch.nn.init.normal_(module.weight)
        torch.testing.assert_close(rms_norm(x, module.weight, eps=1e-5, offset=offset), module(x))


@pytest.mark.parametrize("added", ADDED)
def test_half_rows_with_fp32_weights(added):
    """Mixed precision; the gradients have the dtypes of what they belong to."""
    inputs = _inputs((5, 33), torch.bfloat16, added)
    leaves = [None if t is None else (t if t.dim() > 1 else t.float()).requires_grad_() for t in inputs]
    outputs = _ours(*leaves)
    grads = _gradients(outputs, leaves, [torch.ones(5, 33)] * 2)
    assert [g.dtype for g in grads if g is not None] == [t.dtype for t in leaves if t is not None]
    for got, want in zip(outputs, _torch(*_wide(inputs)), strict=False):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, atol=2e-2, rtol=1e-2)


def _backward_args(inputs, added, forward):
    """Return the arguments of the backward after a forward that gave y, h, rstd."""
    x, w, r, s = inputs
    grad_y = torch.randn(x.shape).to(x)
    grad_h = None if r is None else torch.randn(x.shape).to(x)
    h = x if r is None else forward[1]
    return grad_y, grad_h, h, x if added == "scale" else None, w, s, forward[2], 1.0, True


@pytest.mark.parametrize("shape", [(3, 33), (5, 64), (0, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("added", ADDED)
def test_triton_matches_reference(shape, dtype, added, device, guard):
    inputs = _inputs(shape, dtype, added, device)
    want = op.rms_norm_reference(*inputs, *SETTINGS)
    got = guard.run(op.rms_norm_triton, *inputs, *SETTINGS)
    _assert_all_as_accurate(got, want, op.rms_norm_reference(*_wide(inputs), *SETTINGS))
    args = _backward_args(inputs, added, want)
    got = guard.run(op.rms_norm_bwd_triton, *args)
    _assert_all_as_accurate(got, op.rms_norm_bwd_reference(*args), op.rms_norm_bwd_reference(*_wide(args)))


def test_triton_with_more_rows_than_the_programs_take_at_once(device, guard):
    """Two programs of the backward walk over their rows; their parts of the sums are added."""
    inputs = _inputs((2300, 3), torch.float32, "scale", device)
    want = op.rms_norm_reference(*inputs, *SETTINGS)
    got = guard.run(op.rms_norm_triton, *inputs, *SETTINGS)
    _assert_all_as_accurate(got, want, op.rms_norm_reference(*_wide(inputs), *SETTINGS))
    args = _backward_args(inputs, "scale", want)
    got = guard.run(op.rms_norm_bwd_triton, *args)
    _assert_all_as_accurate(got, op.rms_norm_bwd_reference(*args), op.rms_norm_bwd_reference(*_wide(args)))


@pytest.mark.parametrize("shape", [(3, 5, 33), (130, 64), (2, 200), (0, 16)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("added", ADDED)
def test_native_matches_reference(shape, dtype, added):
    if _native.EXTENSION_MISSING:
        pytest.skip(f"the C++ operators are {_native.EXTENSION_MISSING}")
    inputs = _inputs(shape, dtype, added)
    awkward = [None if t is None else strided(t) for t in inputs]
    want = op.rms_norm_reference(*inputs, *SETTINGS)
    got = torch.ops.fastmllm.rms_norm(*awkward, *SETTINGS)
    assert [(g.dtype, g.shape) for g in got] == [(w.dtype, w.shape) for w in want]
    _assert_all_as_accurate(got, want, op.rms_norm_reference(*_wide(inputs), *SETTINGS))
    args = _backward_args(inputs, added, want)
    want = op.rms_norm_bwd_reference(*args)
    got = torch.ops.fastmllm.rms_norm_bwd(*[strided(a) if isinstance(a, torch.Tensor) else a for a in args])
    assert [(g.dtype, g.shape) for g in got] == [(w.dtype, w.shape) for w in want]
    _assert_all_as_accurate(got, want, op.rms_norm_bwd_reference(*_wide(args)))


@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_every_clone_agrees(level, tmp_path):
    """Compile the loops for one level alone, as the loader picks them on such a machine."""
    compiler = shutil.which("g++")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if compiler is None or {"x86-64-v3": "avx2", "x86-64-v4": "avx512vl", "x86-64": "sse2"}[level] not in flags:
        pytest.skip(f"needs g++ and a machine with {level}")
    code = """
        #include "rms_norm.h"
        #include <vector>
        using namespace fastmllm;
        extern "C" void run(int64_t m, int64_t n, const bfloat16 *x, const bfloat16 *r, const float *w, const float *s,
                            const bfloat16 *dy, const bfloat16 *grad_h, bfloat16 *y, bfloat16 *h, float *rstd,
                            bfloat16 *dh, bfloat16 *dx, float *dw, float *ds) {
          std::vector<float> rows(n + kNormScratch);
          norm_forward(NormForward<bfloat16>{n, 1e-6f, x, r, w, s, y, h, rstd}, 0, m, rows.data());
          NormBackward<bfloat16> back{n, dy, grad_h, h, x, w, s, rstd, dh, dx};
          norm_backward(back, 0, m, dw, ds, rows.data());
        }"""
    (tmp_path / "shim.cpp").write_text(code)
    library = tmp_path / "loops.so"
    command = [compiler, "-O3", "-std=c++17", "-shared", "-fPIC", f"-march={level}", "-DFASTMLLM_ONE_LEVEL"]
    files = [str(tmp_path / "shim.cpp"), str(CSRC / "rms_norm.cpp")]
    subprocess.run([*command, f"-I{CSRC}", *files, "-o", str(library)], check=True, capture_output=True)
    x, w, r, s = inputs = _inputs((6, 133), torch.bfloat16, "scale")
    want = op.rms_norm_reference(*inputs, 1e-6, 0.0)
    grad_y, grad_h, *_ = _backward_args(inputs, "scale", want)
    got = [torch.empty_like(t) for t in want]
    dh, dx, dw, ds = torch.empty_like(x), torch.empty_like(x), torch.zeros(133), torch.zeros(133)
    tensors = x, r, w.float(), s.float(), grad_y, grad_h, *got, dh, dx, dw, ds
    ctypes.CDLL(str(library)).run(*map(ctypes.c_int64, x.shape), *(ctypes.c_void_p(t.data_ptr()) for t in tensors))
    _assert_all_as_accurate(got, want, op.rms_norm_reference(*_wide(inputs), 1e-6, 0.0))
    args = grad_y, grad_h, want[1], x, w, s, want[2], 0.0, True
    wide = op.rms_norm_bwd_reference(*_wide(args))
    _assert_all_as_accurate((dh, dx, dw.to(w), ds.to(w)), op.rms_norm_bwd_reference(*args), wide)


@pytest.mark.parametrize("implementation", ["triton", "cpu"])
def test_a_row_depends_on_no_other_and_a_result_on_no_run(implementation, device):
    forward, backward = (
        (op.rms_norm_triton, op.rms_norm_bwd_triton)
        if implementation == "triton"
        else (torch.ops.fastmllm.rms_norm, torch.ops.fastmllm.rms_norm_bwd)
    )
    inputs = _inputs((11, 33), torch.bfloat16, "scale", device if implementation == "triton" else "cpu")
    whole = forward(*inputs, *SETTINGS)
    args = _backward_args(inputs, "scale", whole)
    grads = backward(*args)
    assert all(torch.equal(a, b) for a, b in zip(whole, forward(*inputs, *SETTINGS), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads, backward(*args), strict=True))
    x, w, r, s = inputs
    for a, part in zip(whole, forward(x[7:9], w, r[7:9], s, *SETTINGS), strict=True):
        assert torch.equal(a[7:9], part)
    grad_y, grad_h, h, _, _, _, rstd, _, _ = (t[7:9] if isinstance(t, torch.Tensor) else t for t in args)
    for a, part in zip(grads[:2], backward(grad_y, grad_h, h, x[7:9], w, s, rstd, 1.0, True)[:2], strict=True):
        assert torch.equal(a[7:9], part)


def test_triton_backward_of_a_stride_0_gradient(device):
    """`.sum().backward()` hands the backward an expanded scalar."""
    x, w, _, _ = _inputs((3, 33), torch.float32, "plain", device)
    _, _, rstd = op.rms_norm_reference(x, w, None, None, *SETTINGS)
    grad = torch.ones((), device=device).expand(3, 33)
    rest = None, x, None, w, None, rstd, 1.0, True
    got = op.rms_norm_bwd_triton(grad, *rest)
    for g, s in zip(got, op.rms_norm_bwd_reference(grad.contiguous(), *rest), strict=True):
        torch.testing.assert_close(g, s, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 8), (torch.float32, MAX_WIDTH + 1)])
def test_what_the_kernels_do_not_take_goes_to_the_reference(dtype, width, device):
    inputs = _inputs((2, width), dtype, "scale", device)
    got, want = op.rms_norm_triton(*inputs, *SETTINGS), op.rms_norm_reference(*inputs, *SETTINGS)
    fake = torch.ops.fastmllm.rms_norm(*[t.to("meta") for t in inputs], *SETTINGS)
    for g, s, f in zip(got, want, fake, strict=True):
        torch.testing.assert_close(g, s, rtol=0, atol=0)
        assert (g.dtype, g.shape) == (f.dtype, f.shape)
    args = _backward_args(inputs, "scale", want)
    if dtype == torch.float32:  # the widest backward with LayerScale is narrower
        args = [
            t[..., : MAX_SCALED_WIDTH + 1] if isinstance(t, torch.Tensor) and t.shape[-1] == width else t for t in args
        ]
    for g, s in zip(op.rms_norm_bwd_triton(*args), op.rms_norm_bwd_reference(*args), strict=True):
        torch.testing.assert_close(g, s, rtol=0, atol=0)


@pytest.mark.parametrize("layout", [(0, 1, 2), (1, 0, 2)])
@pytest.mark.parametrize("added", ["residual", "scale"])
def test_outputs_have_the_layout_that_the_fake_promises(layout, added):
    x, w, r, s = _inputs((3, 4, 8), torch.float32, added)
    args = x.permute(layout), w, r.permute(layout), s, *SETTINGS
    torch.library.opcheck(torch.ops.fastmllm.rms_norm.default, args, test_utils="test_faketensor")
    assert all(t.is_contiguous() for t in (*torch.ops.fastmllm.rms_norm(*args), *op.rms_norm_reference(*args)))


def test_what_is_frozen_costs_no_gradient():
    x, w, r, s = _inputs((4, 8), torch.float32, "scale")
    y, h = rms_norm(x.requires_grad_(), w, r, scale=s)
    saved = y.grad_fn.saved_tensors
    assert saved[1] is None, "x is kept for the gradient of scale alone"
    (y.sum() + h.sum()).backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(sum(t.sum() for t in _torch(x, w, r, s)), x)[0])
    rstd = op.rms_norm_reference(r, w, None, None, *SETTINGS)[2]
    for run in (torch.ops.fastmllm.rms_norm_bwd, op.rms_norm_bwd_reference):
        _, dx, dw, dscale = run(torch.ones_like(r), None, r, None, w, None, rstd, 0.0, False)
        assert dx.numel() == dw.numel() == dscale.numel() == 0


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_any_input_may_be_frozen(frozen):
    inputs = _inputs((3, 5), torch.float64, "scale")
    leaves = [t.requires_grad_() if i != frozen else t for i, t in enumerate(inputs)]
    learned = [t for t in leaves if t.requires_grad]
    grads = [torch.autograd.grad(sum((t * t).sum() for t in f(*leaves)), learned) for f in (_ours, _torch)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("added", ADDED)
def test_opcheck(added):
    inputs = [None if t is None else t.requires_grad_() for t in _inputs((3, 8), torch.float32, added)]
    torch.library.opcheck(torch.ops.fastmllm.rms_norm.default, (*inputs, *SETTINGS))
    args = _backward_args(inputs, added, [t.detach() for t in op.rms_norm_reference(*inputs, *SETTINGS)])
    args = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    torch.library.opcheck(torch.ops.fastmllm.rms_norm_bwd.default, args)


@pytest.mark.parametrize("added", ADDED)
def test_compile(added):
    inputs = [None if t is None else t.requires_grad_() for t in _inputs((3, 8), torch.float32, added)]
    compiled = torch.compile(_ours, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*inputs), _ours(*inputs), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("added", ADDED)
def test_gradcheck(added):
    inputs = [None if t is None else t.requires_grad_() for t in _inputs((2, 5), torch.float64, added)]
    given = [i for i, t in enumerate(inputs) if t is not None]
    places = {place: i for i, place in enumerate(given)}
    assert torch.autograd.gradcheck(
        lambda *t: _ours(*[t[places[i]] if i in places else None for i in range(4)]), [inputs[i] for i in given]
    )


def test_rejects_what_does_not_fit():
    x, w = torch.zeros(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"rms_norm: weight \(3,\).*x is \(2, 4\)"):
        rms_norm(x, torch.ones(3))
    with pytest.raises(ValueError, match=r"rms_norm: x \(2, 4\).*residual \(1, 4\)"):
        rms_norm(x, w, residual=torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"rms_norm: scale \(3,\) torch.float32 and weight \(4,\)"):
        rms_norm(x, w, residual=x, scale=torch.ones(3))
    with pytest.raises(ValueError, match=r"rms_norm: scale \(4,\) .*give the residual"):
        rms_norm(x, w, scale=w)
    with pytest.raises(ValueError, match=r"x torch.int32 .*floating point"):
        rms_norm(x.int(), w)
    with pytest.raises(ValueError, match=r"weight torch.int32 must be floating point"):
        rms_norm(x, w.int())
    far = w.to("meta")
    for name, others in (("weight", (far,)), ("residual", (w, x.to("meta")))):
        with pytest.raises(ValueError, match=rf"x \(2, 4\) is on cpu, but {name} \(.*4,?\) is on meta"):
            rms_norm(x, *others)
    with pytest.raises(ValueError, match=r"but scale \(4,\) is on meta"):
        rms_norm(x, w, residual=x, scale=far)


@pytest.mark.parametrize(("added", "sums"), [("plain", 1), ("residual", 1), ("scale", 2)])
def test_one_launch_each_way_and_no_wait(added, sums):
    """The backward has a sum over its parts besides, and a copy for each gradient of a weight; frozen, none of them."""
    x, w, r, s = _inputs((9, 33), torch.bfloat16, added, "meta")
    with Launches(_norm, "_fwd_kernel", "_bwd_kernel") as launches:
        y, h, rstd = op.rms_norm_triton(x, w, r, s, *SETTINGS)
        assert launches.take() == ["_fwd_kernel"]
        rest = (None if r is None else h, x if r is None else h, None if s is None else x, w, s, rstd, 1.0)
        op.rms_norm_bwd_triton(y, *rest, True)
        assert launches.take() == ["_bwd_kernel", "sum.dim_IntList", *["_to_copy"] * sums]
        rest = (*rest[:2], None, *rest[3:])
        op.rms_norm_bwd_triton(y, *rest, False)
        assert launches.take() == ["_bwd_kernel"]
