// fastmllm::greedy_diverse on the CPU: segment by segment, the cosines of one over the threads.
#include "../greedy_diverse.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace {

using fastmllm::Diversity;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostPairs = 1 << 24; // cosines that are held: 64 MiB

template <typename T> T *data(const Tensor &x) {
  return static_cast<T *>(x.data_ptr());
}

Tensor as(const Tensor &x, ScalarType dtype) {
  return torch::stable::contiguous(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype));
}

template <typename T, typename S>
void segment(const T *x, const S *relevance, int64_t tokens, int64_t width, int64_t kept, Diversity method,
             int64_t *picked) {
  const bool pairs = method == Diversity::kMaxMin || method == Diversity::kCoverage;
  const bool held = pairs && tokens * tokens <= kMostPairs; // the others read the tokens once a pick
  const int64_t tiles = (tokens + fastmllm::kCosineColumns - 1) / fastmllm::kCosineColumns;
  const std::unique_ptr<S[]> unit(new S[tokens * width]), matrix(held ? new S[tokens * tokens] : nullptr);
  const std::unique_ptr<S[]> packed(pairs ? new S[tiles * fastmllm::kCosineColumns * width] : nullptr);
  std::vector<S> norm(tokens), nearest(tokens, -std::numeric_limits<S>::infinity());
  std::vector<int64_t> gain(tokens);
  torch::stable::parallel_for(0, tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      norm[i] = fastmllm::unit_row(x + i * width, unit.get() + i * width, width);
  });
  if (pairs) {
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        fastmllm::pack_units(unit.get(), packed.get(), i, tokens, width);
    });
    const int64_t blocks = (tokens + fastmllm::kCosineRows - 1) / fastmllm::kCosineRows;
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        fastmllm::cosine_rows(unit.get(), packed.get(), i * fastmllm::kCosineRows,
                              std::min(tokens, (i + 1) * fastmllm::kCosineRows), tokens, width, method, matrix.get(),
                              nearest.data(), gain.data());
    });
  }
  fastmllm::pick_diverse(unit.get(), matrix.get(), norm.data(), relevance, nearest.data(), gain.data(), tokens, width,
                         kept, method, picked);
}

std::tuple<Tensor, Tensor> greedy_diverse(const Tensor &tokens_in, const Tensor &cu_in,
                                          std::optional<Tensor> relevance_in, std::optional<Tensor> budget_in,
                                          int64_t k, int64_t total, int64_t, const std::string &name, bool in_order) {
  const Diversity method = name == "max_min"    ? Diversity::kMaxMin
                           : name == "dpp"      ? Diversity::kDpp
                           : name == "coverage" ? Diversity::kCoverage
                                                : Diversity::kResidual;
  const ScalarType dtype = tokens_in.scalar_type();
  const bool wide = dtype == ScalarType::Double, half = dtype == ScalarType::BFloat16;
  const ScalarType sum_dtype = wide ? ScalarType::Double : ScalarType::Float;
  const Tensor x = half ? torch::stable::contiguous(tokens_in) : as(tokens_in, sum_dtype); // fp16 is widened
  const Tensor cu_tensor = as(cu_in, ScalarType::Long);
  Tensor relevance, budget;
  if (relevance_in)
    relevance = as(*relevance_in, sum_dtype);
  if (budget_in)
    budget = as(*budget_in, ScalarType::Long);
  const int64_t tokens = x.size(0), width = x.size(1), segments = cu_tensor.size(0) - 1;
  const int64_t *cu = data<int64_t>(cu_tensor);
  Tensor index_tensor = torch::stable::new_empty(cu_tensor, {total}, ScalarType::Long);
  Tensor new_cu_tensor = torch::stable::new_empty(cu_tensor, {segments + 1}, ScalarType::Int);
  auto *index = data<int64_t>(index_tensor);
  auto *new_cu = data<int32_t>(new_cu_tensor);
  int64_t row = 0;
  new_cu[0] = 0;
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t first = cu[s], length = cu[s + 1] - first;
    STD_TORCH_CHECK(cu[0] == 0 && length >= 0 && cu[s + 1] <= tokens, "fastmllm::greedy_diverse: cu_seqlens[", s, ":",
                    s + 2, "] = ", first, ", ", cu[s + 1], " must begin at 0, rise, and end within ", tokens);
    const int64_t wanted = budget_in ? std::max<int64_t>(data<int64_t>(budget)[s], 0) : k;
    const int64_t kept = std::min({wanted, length, total - row});
    if (kept) {
      if (wide)
        segment(data<double>(x) + first * width, relevance_in ? data<double>(relevance) + first : nullptr, length,
                width, kept, method, index + row);
      else if (half)
        segment(data<fastmllm::bfloat16>(x) + first * width, relevance_in ? data<float>(relevance) + first : nullptr,
                length, width, kept, method, index + row);
      else
        segment(data<float>(x) + first * width, relevance_in ? data<float>(relevance) + first : nullptr, length, width,
                kept, method, index + row);
      if (in_order)
        std::sort(index + row, index + row + kept);
      for (int64_t i = row; i < row + kept; ++i)
        index[i] += first;
    }
    row += kept;
    new_cu[s + 1] = int32_t(row);
  }
  std::fill(index + row, index + total, int64_t(-1));
  return {index_tensor, new_cu_tensor};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmllm, CPU, m) {
  m.impl("greedy_diverse", TORCH_BOX(&greedy_diverse));
}
