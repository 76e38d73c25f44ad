"""insert_features: equals transformers' masked_scatter, autograd and the dispatcher hold."""

from __future__ import annotations

import pytest
import torch
from launches import Launches
from oracle import gradients, strided

from fastmllm.kernels import _native
from fastmllm.kernels import insert_features as op
from fastmllm.kernels.insert_features import insert_features

SHAPES = [(11, 5, 33), (8, 8, 16), (7, 0, 4), (0, 0, 4), (1, 1, 1)]  # T, F, D


def _inputs(shape, dtype, device="cpu"):
    torch.manual_seed(0)
    tokens, count, width = shape
    index = torch.randperm(tokens)[:count]
    tensors = torch.randn(tokens, width).to(device, dtype), torch.randn(count, width).to(device, dtype)
    return *tensors, index.to(device)


def _masked_scatter(embeddings, features, index):
    mask = torch.zeros(len(embeddings), 1, dtype=torch.bool, device=index.device)
    mask[index] = True
    return embeddings.masked_scatter(mask.expand_as(embeddings), features[index.argsort()])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_masked_scatter(shape, dtype):
    embeddings, features, index = _inputs(shape, dtype)
    ours = [strided(t).requires_grad_() for t in (embeddings, features)]
    theirs = [t.requires_grad_() for t in (embeddings, features)]
    out, want = insert_features(*ours, strided(index)), _masked_scatter(*theirs, index)
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    seed = torch.randn(out.shape)
    for g, w in zip(gradients([out], ours, [seed]), gradients([want], theirs, [seed]), strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0)


def test_a_stride_0_gradient_and_frozen_embeddings():
    embeddings, features, index = _inputs((7, 3, 4), torch.float32)
    insert_features(embeddings, features.requires_grad_(), index).sum().backward()
    torch.testing.assert_close(features.grad, torch.ones(3, 4))
    dembeddings, _ = torch.ops.fastmllm.insert_features_bwd(torch.ones(7, 4), index, False)
    assert dembeddings.numel() == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_matches_reference(shape, dtype):
    """The CUDA C++ kernels move the same rows, in words of 16, 4 and 2 bytes."""
    if _native.LIBRARY_MISSING:
        pytest.skip(f"the CUDA C++ operators are {_native.LIBRARY_MISSING}")
    args = _inputs(shape, dtype, "cuda")
    torch.testing.assert_close(torch.ops.fastmllm.insert_features(*args), op.insert_features_reference(*args))
    for embedding_grad in (True, False):
        got = torch.ops.fastmllm.insert_features_bwd(args[0], args[2], embedding_grad)
        want = op.insert_features_bwd_reference(args[0], args[2], embedding_grad)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_native_matches_reference(shape, dtype):
    if _native.EXTENSION_MISSING:
        pytest.skip(f"the C++ operators are {_native.EXTENSION_MISSING}")
    embeddings, features, index = _inputs(shape, dtype)
    got = torch.ops.fastmllm.insert_features(strided(embeddings), strided(features), strided(index))
    torch.testing.assert_close(got, op.insert_features_reference(embeddings, features, index), rtol=0, atol=0)
    for embedding_grad in (True, False):
        back = torch.ops.fastmllm.insert_features_bwd(strided(embeddings), strided(index), embedding_grad)
        want = op.insert_features_bwd_reference(embeddings, index, embedding_grad)
        torch.testing.assert_close(back, want, rtol=0, atol=0)


def test_opcheck():
    embeddings, features, index = _inputs((7, 3, 4), torch.float32)
    args = (embeddings.requires_grad_(), features.requires_grad_(), index)
    torch.library.opcheck(torch.ops.fastmllm.insert_features.default, args)


def test_compile():
    args = _inputs((7, 3, 4), torch.float32)
    compiled = torch.compile(insert_features, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), insert_features(*args))


def test_gradcheck():
    embeddings, features, index = _inputs((5, 2, 3), torch.float64)
    args = (embeddings.requires_grad_(), features.requires_grad_())
    assert torch.autograd.gradcheck(lambda e, f: insert_features(e, f, index), args)


def test_rejects_what_does_not_fit():
    embeddings, features, index = _inputs((7, 3, 4), torch.float32)
    with pytest.raises(ValueError, match=r"insert_features: embeddings \(7, 4\).*features \(3, 2\)"):
        insert_features(embeddings, features[:, :2], index)
    with pytest.raises(ValueError, match=r"insert_features: index \(2,\).*features \(3, 4\)"):
        insert_features(embeddings, features, index[:2])
    with pytest.raises(ValueError, match="int64"):
        insert_features(embeddings, features, index.int())
    with pytest.raises(ValueError, match="cast the features"):
        insert_features(embeddings, features.bfloat16(), index)
    with pytest.raises((IndexError, RuntimeError), match="index"):  # torch's own, or the C++ operator's
        insert_features(embeddings, features, index + 7)


def test_operations_of_the_reference_and_no_wait():
    """What a GPU without the CUDA library runs; meta tensors cannot be waited for."""
    embeddings, features, index = _inputs((9, 4, 5), torch.bfloat16, "meta")
    with Launches(op) as launches:
        op.insert_features_reference(embeddings, features, index)
        assert launches.take() == ["index_copy"]
        op.insert_features_bwd_reference(embeddings, index, True)
        assert launches.take() == ["index_select", "index_fill.int_Scalar"]
        op.insert_features_bwd_reference(embeddings, index, False)
        assert launches.take() == ["index_select"]
