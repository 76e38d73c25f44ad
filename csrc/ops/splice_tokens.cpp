// fastmllm::splice_tokens and its backward on the CPU: every row is read once and written once.
#include "../splice_tokens.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
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

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmllm, CPU, m) {
  m.impl("splice_tokens", TORCH_BOX(&splice_tokens));
  m.impl("splice_tokens_bwd", TORCH_BOX(&splice_tokens_bwd));
}
