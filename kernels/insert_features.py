"""Put image features into the text's embeddings, in place of the image tokens' (LLaVA, arXiv 2304.08485).

Shapes: T tokens of the packed batch, F features (all images' visual tokens), D width. It moves rows and computes
nothing, so the CUDA implementation is CUDA C++ (csrc/insert_features.cu), which moves every row once, and there is no
Triton kernel. Without that library the reference runs on the GPU, which moves the images' rows twice. It is the splice
whose placeholders are already repeated and whose rows the device knows: on the CPU it runs `splice_tokens`'s C++.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native  # noqa: F401 - registers the CPU and the CUDA operator


# 1. reference ---------------------------------------------------------------------------------------------------------
def insert_features_reference(embeddings: Tensor, features: Tensor, index: Tensor) -> Tensor:
    return embeddings.index_copy(0, index, features)


def insert_features_bwd_reference(grad: Tensor, index: Tensor, embedding_grad: bool) -> tuple[Tensor, Tensor]:
    dfeatures = grad.index_select(0, index)
    return grad.index_fill(0, index, 0) if embedding_grad else grad.new_empty(0), dfeatures


# 4. operator ----------------------------------------------------------------------------------------------------------
# Parts 2 and 3, the kernels and their launchers, are csrc/insert_features.cu.
_insert_features = torch.library.custom_op(
    "fastmllm::insert_features",
    insert_features_reference,
    mutates_args=(),
    schema="(Tensor embeddings, Tensor features, Tensor index) -> Tensor",
)

_insert_features_bwd = torch.library.custom_op(
    "fastmllm::insert_features_bwd",
    insert_features_bwd_reference,
    mutates_args=(),
    schema="(Tensor grad, Tensor index, bool embedding_grad) -> (Tensor, Tensor)",
)


# 5. fake --------------------------------------------------------------------------------------------------------------
@_insert_features.register_fake
def _(embeddings, features, index):
    return torch.empty_like(embeddings, memory_format=torch.contiguous_format)


@_insert_features_bwd.register_fake
def _(grad, index, embedding_grad):
    dfeatures = grad.new_empty((index.shape[0], grad.shape[1]))
    return grad.new_empty(grad.shape if embedding_grad else 0), dfeatures


# 6. autograd ----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[2])


def _backward(ctx, grad):
    (index,) = ctx.saved_tensors
    need_embeddings, need_features, _ = ctx.needs_input_grad
    dembeddings, dfeatures = _insert_features_bwd(grad.contiguous(), index, need_embeddings)
    return dembeddings if need_embeddings else None, dfeatures if need_features else None, None


_insert_features.register_autograd(_backward, setup_context=_setup_context)


# 7. public function ---------------------------------------------------------------------------------------------------
def insert_features(embeddings: Tensor, features: Tensor, index: Tensor) -> Tensor:
    """Return the embeddings with some rows replaced by features.

    Args:
        embeddings: (T, D) float embeddings of the packed tokens.
        features: (F, D) visual tokens, same dtype.
        index: (F,) int64 row of each feature, without duplicates.

    Returns:
        (T, D); the gradient of a replaced row goes to its feature only.

    Raises:
        ValueError: shapes or dtypes do not fit together.

    Equal to transformers' `inputs_embeds.masked_scatter(image_mask, image_features)`, without its host synchronisation.
    """
    if embeddings.dim() != 2 or features.dim() != 2 or embeddings.shape[1] != features.shape[1]:
        raise ValueError(f"fastmllm::insert_features: embeddings {tuple(embeddings.shape)} must be (T, D) and features "
                         f"{tuple(features.shape)} (F, D)")  # fmt: skip
    if index.shape != features.shape[:1] or index.dtype != torch.int64:
        raise ValueError(f"fastmllm::insert_features: index {tuple(index.shape)} {index.dtype} must be int64, one "
                         f"row for each of features {tuple(features.shape)}: has every image its tokens?")  # fmt: skip
    if embeddings.dtype != features.dtype or not embeddings.is_floating_point():
        raise ValueError(f"fastmllm::insert_features: embeddings are {embeddings.dtype} and features {features.dtype}: "
                         "cast the features to the dtype of the language model")  # fmt: skip
    return _insert_features(embeddings, features, index)
