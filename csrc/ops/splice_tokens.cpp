// fastmllm::splice_tokens and insert_features on the CPU, forward and backward: every row is read once and written
// once.
#include "../splice_tokens.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTask = 1 << 18; // bytes: fewer are not worth a thread

Tensor gather(const Tensor &a, const Tensor &b, int64_t b_rows, const Tensor &rows_in, const char *op) {
  const Tensor rows = torch::stable::contiguous(torch::stable::to(rows_in, ScalarType::Long));
  const int64_t count = rows.numel(), a_rows = a.size(0), bytes = a.size(1) * a.element_size();
  Tensor out = torch::stable::new_empty(a, {count, a.size(1)});
  if (out.numel() == 0)
    return out;
  std::atomic<int64_t> wrong{-1};
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kTask / bytes), [&](int64_t begin, int64_t end) {
    const int64_t bad = fastmllm::gather_rows(
        static_cast<const char *>(a.data_ptr()), a_rows, static_cast<const char *>(b.data_ptr()), a_rows + b_rows,
        static_cast<const int64_t *>(rows.data_ptr()), begin, end, bytes, static_cast<char *>(out.data_ptr()));
    if (bad >= 0)
      wrong = bad;
  });
  STD_TORCH_CHECK(wrong < 0, op, ": row ", wrong.load(), " comes from outside of the ", a_rows + b_rows, " rows given");
  return out;
}

Tensor splice_tokens(const Tensor &text, const Tensor &visual, const Tensor &source, const Tensor &, const Tensor &) {
  STD_TORCH_CHECK(text.size(1) == visual.size(1) && text.scalar_type() == visual.scalar_type(),
                  "fastmllm::splice_tokens: text and visual differ in width or dtype");
  return gather(torch::stable::contiguous(text), torch::stable::contiguous(visual), visual.size(0), source,
                "fastmllm::splice_tokens");
}

std::tuple<Tensor, Tensor> splice_tokens_bwd(const Tensor &grad_in, const Tensor &text_rows, const Tensor &visual_rows,
                                             bool text_grad, bool visual_grad) {
  const Tensor grad = torch::stable::contiguous(grad_in);
  const auto part = [&](bool wanted, const Tensor &rows) {
    return wanted ? gather(grad, grad, 0, rows, "fastmllm::splice_tokens_bwd")
                  : torch::stable::new_empty(grad, {int64_t(0)});
  };
  return {part(text_grad, text_rows), part(visual_grad, visual_rows)};
}

// The splice whose output has as many rows as the text: row index[f] is feature f, or, without features, missing (-1).
Tensor replaced_rows(const Tensor &index_in, int64_t tokens, bool features, const char *op) {
  const Tensor index = torch::stable::contiguous(torch::stable::to(index_in, ScalarType::Long));
  Tensor rows = torch::stable::new_empty(index, {tokens});
  auto *row = static_cast<int64_t *>(rows.data_ptr());
  std::iota(row, row + tokens, int64_t(0));
  for (int64_t f = 0; f < index.numel(); ++f) {
    const int64_t i = static_cast<const int64_t *>(index.data_ptr())[f];
    STD_TORCH_CHECK(i >= 0 && i < tokens, op, ": index ", i, " is outside of the ", tokens, " rows");
    row[i] = features ? tokens + f : -1;
  }
  return rows;
}

Tensor insert_features(const Tensor &embeddings, const Tensor &features, const Tensor &index) {
  const Tensor source = replaced_rows(index, embeddings.size(0), true, "fastmllm::insert_features");
  return splice_tokens(embeddings, features, source, index, index);
}

std::tuple<Tensor, Tensor> insert_features_bwd(const Tensor &grad, const Tensor &index, bool embedding_grad) {
  const Tensor text_rows =
      embedding_grad ? replaced_rows(index, grad.size(0), false, "fastmllm::insert_features_bwd") : index;
  return splice_tokens_bwd(grad, text_rows, index, embedding_grad, true);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmllm, CPU, m) {
  m.impl("insert_features", TORCH_BOX(&insert_features));
  m.impl("insert_features_bwd", TORCH_BOX(&insert_features_bwd));
  m.impl("splice_tokens", TORCH_BOX(&splice_tokens));
  m.impl("splice_tokens_bwd", TORCH_BOX(&splice_tokens_bwd));
}
