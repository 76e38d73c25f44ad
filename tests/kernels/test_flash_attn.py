"""The adapter to flash_attn: stand-ins with the documented signatures and the documented untidiness of each generation.

They compute with our reference. Rows behind the last segment stay uninitialised (NaN here), forward and backward.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from oracle import gradients

from fastmllm.kernels import _flash_attn
from fastmllm.kernels import attention as op
from fastmllm.kernels.attention import attention


def _cu(lengths):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


def _inputs(len_q, len_k, behind=0, heads=4, heads_k=2, d=32):
    torch.manual_seed(0)
    inputs = []
    for lengths, n in ((len_q, heads), (len_k, heads_k), (len_k, heads_k)):
        rows = torch.randn(sum(lengths) + behind, n, d).bfloat16()
        rows[sum(lengths) :] = math.nan
        inputs.append(rows)
    return inputs, _cu(len_q), _cu(len_k)


class _Flash(torch.autograd.Function):
    """What every generation does: packed rows, bottom-right causal, (H, T) log-sum-exp, only rows in segments."""

    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, blind):
        assert q.dim() == k.dim() == v.dim() == 3
        assert all(t.dtype == torch.bfloat16 and t.stride(-1) == 1 for t in (q, k, v))
        assert all(cu.dtype == torch.int32 and cu.is_contiguous() for cu in (cu_q, cu_k))
        assert isinstance(max_q, int)
        assert isinstance(max_k, int)
        ctx.args = (cu_q, cu_k, max_q, max_k, causal, scale)
        out, lse = op.attention_reference(q, k, v, *ctx.args)
        out[cu_q[-1] :] = math.nan
        lse = lse.masked_fill(lse.isneginf(), blind)
        lse[:, cu_q[-1] :] = math.nan
        ctx.save_for_backward(q, k, v, out, lse)  # a change of `out` in place would be an error in the backward
        return out, lse

    @staticmethod
    def backward(ctx, grad, _grad_lse):
        q, k, v, out, lse = ctx.saved_tensors
        grads = op.attention_bwd_reference(grad, q, k, v, out, lse.masked_fill(lse == math.inf, -math.inf), *ctx.args)
        for g, cu in zip(grads, (ctx.args[0], ctx.args[1], ctx.args[1]), strict=True):
            g[cu[-1] :] = math.nan
        return *grads, *(None,) * 7


# The packages' documented signatures, as of flash-attn 2.8, hopper 3.0 and flash-attn-4 4.0.
def _fa2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    assert dropout_p == 0.0
    out, lse = _Flash.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale,
                            math.inf)  # fmt: skip
    return (out, lse, None) if return_attn_probs else out


def _fa3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
    causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    assert seqused_q is None
    out, lse = _Flash.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale,
                            -math.inf)  # fmt: skip
    return (out, lse) if return_attn_probs else out


def _fa4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None,
    return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
):  # fmt: skip
    assert qv is None
    out, lse = _Flash.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale,
                            -math.inf)  # fmt: skip
    return out, (lse if return_lse else None)


STAND_INS = {  # generation: (distribution, module, varlen function, compute capability that prefers it)
    "FA2": ("flash_attn", "flash_attn", _fa2, 8),
    "FA3": ("flash_attn_3", "flash_attn_interface", _fa3, 9),
    "FA4": ("flash_attn_4", "flash_attn.cute", _fa4, 10),
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a distribution for one test: its metadata on the path, and its modules or nothing to import.

    The function it returns lists the calls that the package got.
    """

    def add(distribution, module, function=None, capability=8):
        calls = []
        info = tmp_path / f"{distribution}-9.9.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution.replace('_', '-')}\nVersion: 9.9\n")
        for part in (module.split(".")[0], module):
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part) if function else None)
        if function:
            sys.modules[module].flash_attn_varlen_func = functools.wraps(function)(
                lambda *args, **kwargs: calls.append(kwargs) or function(*args, **kwargs)
            )
        monkeypatch.setattr(_flash_attn, "_capability", lambda q: capability)
        return calls

    monkeypatch.syspath_prepend(str(tmp_path))
    _flash_attn.load.cache_clear()
    yield add
    _flash_attn.load.cache_clear()


def _grads(inputs, seed, *args, **kwargs):
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = attention(*leaves, *args, **kwargs)
    return out, *gradients([out], leaves, [seed])


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("lengths", [([3, 4], [5, 4]), ([4, 0, 3], [2, 3, 3])], ids=["longer keys", "blind rows"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("behind", [0, 3])
def test_is_called_as_it_documents_itself(name, lengths, causal, behind, install):
    """Layouts, bottom-right causal, and zeros behind the last segment, forward and backward."""
    calls = install(*STAND_INS[name])
    inputs, cu_q, cu_k = _inputs(*lengths, behind)
    seed = torch.randn(inputs[0].shape)
    got = _grads(inputs, seed, cu_q, cu_k, causal=causal)
    assert len(calls) == 1
    want = _grads([t.float() for t in inputs], seed, cu_q, cu_k, causal=causal)
    assert len(calls) == 1, "float32 goes to our own kernels"
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.float(), w, atol=4e-2, rtol=2e-2)
    assert torch.equal(got[0][sum(lengths[0]) :], torch.zeros_like(got[0][sum(lengths[0]) :]))


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("grad", [False, True])
def test_returns_the_log_sum_exp_in_one_form(name, grad, install):
    calls = install(*STAND_INS[name])
    inputs, cu_q, cu_k = _inputs([4, 0, 3], [2, 3, 3], 2)
    inputs[0].requires_grad_(grad)
    out, lse = attention(*inputs, cu_q, cu_k, causal=True, return_lse=True)
    assert len(calls) == 1
    want = attention(*[t.float() for t in inputs], cu_q, cu_k, causal=True, return_lse=True)
    torch.testing.assert_close(lse, want[1], atol=1e-3, rtol=1e-3)
    assert not lse.requires_grad
    assert out.requires_grad == grad


def test_what_flash_attn_does_not_take_goes_to_our_kernels(install):
    calls = install(*STAND_INS["FA2"])
    inputs, cu_q, cu_k = _inputs([3, 4], [5, 4])
    attention(*[t[..., :6] for t in inputs], cu_q, cu_k)
    attention(*inputs, cu_q, cu_k, key_bias=torch.zeros(9))
    attention(*inputs, _cu([]), _cu([]))
    attention(*[t[:0] for t in inputs], _cu([0]), _cu([0]))
    compiled = torch.compile(lambda *t: attention(*t, cu_q, cu_k, 4, 5), fullgraph=True, backend="eager")
    compiled(*inputs)
    assert calls == []
    attention(*inputs, cu_q, cu_k)
    assert len(calls) == 1
    assert calls[0]["softmax_scale"] == 32**-0.5


@pytest.mark.parametrize("d, capability, taken", [(72, 9, True), (72, 10, False), (128, 10, True), (256, 10, False)])
def test_fa4_is_taken_where_its_backward_exists(d, capability, taken, install):
    calls = install(*STAND_INS["FA4"][:3], capability)
    inputs, cu_q, cu_k = _inputs([2], [3], d=d)
    attention(*inputs, cu_q, cu_k)
    assert len(calls) == taken


def test_an_old_package_that_cannot_return_the_log_sum_exp(install):
    """FA3 has the argument since its commit 203b9b3; flash-attn before 2.7 pads the log-sum-exp."""

    def old(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
        return _fa3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, None, softmax_scale, causal)

    calls = install("flash_attn_3", "flash_attn_interface", old, 9)
    inputs, cu_q, cu_k = _inputs([2, 1], [3, 1])
    out, lse = attention(*inputs, cu_q, cu_k, return_lse=True)
    assert calls == []
    torch.testing.assert_close(attention(*inputs, cu_q, cu_k), out)
    assert len(calls) == 1
    assert lse.shape == (4, 3)


@pytest.mark.parametrize("name", STAND_INS)
def test_the_same_gradients_twice_are_asked_for(name, install):
    calls = install(*STAND_INS[name])
    inputs, cu_q, cu_k = _inputs([3, 4], [5, 4])
    _grads(inputs, torch.randn(inputs[0].shape), cu_q, cu_k)
    assert calls[0]["deterministic"] is True
    attention(*inputs, cu_q, cu_k)
    assert len(calls) == 2, "without a gradient there is nothing to put in order"


@pytest.mark.parametrize("d, taken", [(192, True), (200, False)])
def test_fa3_refuses_wide_heads_in_order_so_our_kernels_train_them(d, taken, install):
    calls = install(*STAND_INS["FA3"])
    inputs, cu_q, cu_k = _inputs([2], [3], d=d)
    _grads(inputs, torch.randn(inputs[0].shape), cu_q, cu_k)
    assert len(calls) == taken
    attention(*inputs, cu_q, cu_k)
    assert len(calls) == taken + 1


def test_a_package_that_cannot_put_gradients_in_order_does_not_train(install):
    def old(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
        return _fa2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale, causal)

    calls = install("flash_attn", "flash_attn", old)
    inputs, cu_q, cu_k = _inputs([2, 1], [3, 1])
    _grads(inputs, torch.randn(inputs[0].shape), cu_q, cu_k)
    assert calls == []
    attention(*inputs, cu_q, cu_k)
    assert len(calls) == 1


def test_a_padded_log_sum_exp_is_refused(install):
    def padded(*args, return_attn_probs=False, **kwargs):
        out, lse, _ = _fa2(*args, return_attn_probs=True, **kwargs)
        return out, lse[None], None

    install("flash_attn", "flash_attn", padded)
    inputs, cu_q, cu_k = _inputs([2], [3])
    with pytest.raises(RuntimeError, match=r"flash-attn 9.9 returns a log-sum-exp \(1, 4, 2\).*install flash-attn 2.7"):
        attention(*inputs, cu_q, cu_k, return_lse=True)


@pytest.mark.parametrize("name", STAND_INS)
def test_the_status_names_the_version(name, install):
    install(*STAND_INS[name])
    status = _flash_attn.flash_attn_status()
    assert "9.9" in status[name]


def test_the_status_names_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(_flash_attn, "_FLASH", {"FA3": ("no-such-flash-attn", "no_such", "")})
    _flash_attn.load.cache_clear()
    assert _flash_attn.flash_attn_status() == {"FA3": "no-such-flash-attn is not installed"}
    _flash_attn.load.cache_clear()


def test_a_broken_flash_attn_is_named_once_and_passed_over(install):
    """A build without a GPU leaves an installed distribution that cannot be imported."""
    install("flash_attn", "flash_attn")
    inputs, cu_q, cu_k = _inputs([3, 1], [3, 1])
    with pytest.warns(UserWarning, match="flash-attn 9.9 is installed but does not work"):
        got = attention(*inputs, cu_q, cu_k)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(got, attention(*inputs, cu_q, cu_k))
    assert "does not work" in _flash_attn.flash_attn_status()["FA2"]


@pytest.mark.parametrize("shape", [(7, 2, 8), (5, 3, 1000)])
def test_the_kernel_that_clears_rows(shape, device, guard):
    tensor = guard(torch.full(shape, math.nan, device=device))
    tensor[:3] = 1.0
    for end in (shape[0], 3):
        _flash_attn.clear_rows_triton(tensor, torch.tensor([0, 1, end], dtype=torch.int32, device=device))
        assert torch.equal(tensor[:3], torch.ones_like(tensor[:3]))
        assert bool(tensor[3:].isnan().all()) == (end == shape[0])
    assert not tensor[3:].any()


# The packages themselves, where they are installed -------------------------------------------------------------------
@pytest.mark.parametrize("name", STAND_INS)
def test_a_stand_in_has_the_signature_of_the_package(name):
    _flash_attn.load.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function = _flash_attn.load()[1].get(name)
    if function is None:
        pytest.skip(_flash_attn.flash_attn_status()[name])
    ours = inspect.signature(STAND_INS[name][2]).parameters
    assert list(inspect.signature(function).parameters) == list(ours)


# FA4 is Python that compiles for a named GPU without having one: `make flash-attn-4` fetches it (106 MB, unpacked
# 321 MB: too much for every `make test`) beside the environment, and runs this test. It passed with flash-attn-4
# 4.0.0b36, nvidia-cutlass-dsl 4.8.1 (cu13) and torch 2.13 on a CPU, in 36 s of processor time: forward and backward at
# six widths. The backward in a fixed order (deterministic=True) asks torch for a device first: it is not compiled here.
FA4_FOLDER = Path(__file__).parents[2] / "build" / "flash-attn-4"
FA4_COMPILE = """
import inspect
import torch
from flash_attn.cute import flash_attn_varlen_func, interface
from torch._subclasses.fake_tensor import FakeTensorMode

print(*inspect.signature(flash_attn_varlen_func).parameters)
with FakeTensorMode():
    def make(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="cuda")

    for d, causal in ((64, False), (72, False), (80, False), (88, False), (96, False), (128, True)):
        q, k, cu = make(200, 8, d), make(900, 2, d), make(4, dtype=torch.int32)
        options = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=100, max_seqlen_k=577, causal=causal)
        out, lse, *_ = interface._flash_attn_fwd(q, k, k, return_lse=True, **options)
        assert lse.shape == (8, 200)
        interface._flash_attn_bwd(q, k, k, out, out, lse, **options)
print("compiled")
"""


def test_fa4_compiles_for_sm_90a_without_a_device():
    """The widths of towers and decoders, forward and backward, and the signature that the stand-in has."""
    if not FA4_FOLDER.exists() and importlib.util.find_spec("cutlass") is None:
        pytest.skip("flash-attn-4 is not here: make flash-attn-4")
    target = {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132"}
    folders = (FA4_FOLDER, FA4_FOLDER / "nvidia_cutlass_dsl" / "dsl_packages", os.environ.get("PYTHONPATH", ""))
    target["PYTHONPATH"] = os.pathsep.join(str(f) for f in folders if str(f))
    command = [sys.executable, "-W", "ignore", "-c", FA4_COMPILE]
    done = subprocess.run(command, env={**os.environ, **target}, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("compiled\n"), done.stderr[-2000:]
    assert done.stdout.splitlines()[0].split() == list(inspect.signature(_fa4).parameters)
