// fastmllm::token_select on the CPU: segments over the threads, then rows.
#include "../token_select.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T> T *data(const Tensor &x) {
  return static_cast<T *>(x.data_ptr());
}

Tensor as(const Tensor &x, ScalarType dtype) { // every call into torch takes about as long as selecting 100 tokens
  const Tensor same = x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
  return same.is_contiguous() ? same : torch::stable::contiguous(same);
}

// Gather rows of x by an index that lies where they are needed; `rows` of them.
template <typename I> Tensor gathered(const Tensor &x_in, const I *index, int64_t rows) {
  const Tensor x = x_in.is_contiguous() ? x_in : torch::stable::contiguous(x_in);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const int64_t bytes = x.size(0) ? x.numel() / x.size(0) * x.element_size() : 0;
  shape[0] = rows;
  Tensor y = torch::stable::new_empty(x, shape);
  const auto *source = data<const char>(x);
  auto *target = data<char>(y);
  torch::stable::parallel_for(
      0, rows, std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(bytes, 1)),
      [&](int64_t begin, int64_t end) { fastmllm::gather_rows(source, index, begin, end, bytes, target); });
  return y;
}

std::vector<Tensor> token_select(std::vector<Tensor> xs, const Tensor &cu_in, const Tensor &scores_in,
                                 std::optional<Tensor> budget_in, int64_t k, int64_t total, int64_t) {
  const Tensor cu_tensor = as(cu_in, ScalarType::Long), scores = as(scores_in, ScalarType::Float);
  const int64_t tokens = scores.size(0), segments = cu_tensor.size(0) - 1;
  const int64_t *cu = data<int64_t>(cu_tensor);
  Tensor budgets;
  if (budget_in)
    budgets = as(*budget_in, ScalarType::Long);
  Tensor index_tensor = torch::stable::new_empty(cu_tensor, {total}, ScalarType::Long);
  Tensor place_tensor = torch::stable::new_empty(cu_tensor, {tokens}, ScalarType::Int);
  Tensor new_cu_tensor = torch::stable::new_empty(cu_tensor, {segments + 1}, ScalarType::Int);
  auto *index = data<int64_t>(index_tensor);
  auto *place = data<int32_t>(place_tensor), *new_cu = data<int32_t>(new_cu_tensor);

  int64_t rows = 0;
  new_cu[0] = 0;
  for (int64_t s = 0; s < segments; ++s) {
    STD_TORCH_CHECK(cu[0] == 0 && cu[s] <= cu[s + 1] && cu[s + 1] <= tokens, "fastmllm::token_select: cu_seqlens[", s,
                    ":", s + 2, "] = ", cu[s], ", ", cu[s + 1], " must begin at 0, rise, and end within ", tokens);
    const int64_t wanted = budget_in ? std::max<int64_t>(data<int64_t>(budgets)[s], 0) : k;
    rows += std::min({wanted, cu[s + 1] - cu[s], total - rows});
    new_cu[s + 1] = int32_t(rows);
  }
  std::fill(index + rows, index + total, int64_t(-1));
  std::fill(place + cu[segments], place + tokens, -1);
  std::vector<uint64_t> scratch(tokens);
  torch::stable::parallel_for(0, segments, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s)
      fastmllm::select_segment(data<float>(scores) + cu[s], cu[s + 1] - cu[s], new_cu[s + 1] - new_cu[s], cu[s],
                               new_cu[s], scratch.data() + cu[s], index, place + cu[s]);
  });

  std::vector<Tensor> out;
  for (const Tensor &x : xs)
    out.push_back(gathered(x, index, total));
  out.push_back(index_tensor);
  out.push_back(place_tensor);
  out.push_back(new_cu_tensor);
  return out;
}

std::vector<Tensor> token_select_bwd(std::vector<Tensor> grads, const Tensor &, const Tensor &place_in) {
  const Tensor place = as(place_in, ScalarType::Int);
  std::vector<Tensor> out;
  for (const Tensor &grad : grads)
    out.push_back(gathered(grad, data<const int32_t>(place), place.size(0)));
  return out;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmllm, CPU, m) {
  m.impl("token_select", TORCH_BOX(&token_select));
  m.impl("token_select_bwd", TORCH_BOX(&token_select_bwd));
}
