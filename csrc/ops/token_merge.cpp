// fastmllm::token_merge on the CPU: one pass to match, one to merge, segments and row blocks over the threads.
#include "../token_merge.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRowBlock = 24; // even tokens a task

Tensor as(const Tensor &x, ScalarType dtype) {
  return torch::stable::contiguous(torch::stable::to(x, dtype));
}

template <typename T> T *data(const Tensor &x) {
  return static_cast<T *>(x.data_ptr());
}

// The segments of a pack: first token, and in the buffers of the match the first even token and the odd columns.
struct Segments {
  std::vector<int64_t> first, row, even, column, padded, merged;
  int64_t count() const { return int64_t(merged.size()); }
  int64_t tokens(int64_t s) const { return first[s + 1] - first[s]; }
};

Segments read_segments(const Tensor &cu_seqlens, const std::vector<int64_t> &removed, int64_t tokens,
                       int64_t is_protected) {
  STD_TORCH_CHECK(cu_seqlens.scalar_type() == ScalarType::Int, "fastmllm::token_merge: cu_seqlens must be int32");
  const Tensor cu = torch::stable::contiguous(cu_seqlens);
  const auto *starts = data<int32_t>(cu);
  Segments found;
  found.first.assign(starts, starts + cu.size(0));
  found.even.push_back(0);
  found.column.push_back(0);
  const int64_t count = cu.size(0) - 1;
  STD_TORCH_CHECK(count >= 0 && int64_t(removed.size()) == count + 1 && starts[0] == 0 && starts[count] == tokens,
                  "fastmllm::token_merge: cu_seqlens and removed do not fit ", tokens, " tokens");
  for (int64_t s = 0; s < count; ++s) {
    const int64_t n = found.tokens(s), r = removed[s + 1] - removed[s];
    STD_TORCH_CHECK(n >= 0 && r >= 0 && 2 * r <= std::max<int64_t>(n - is_protected, 0), "fastmllm::token_merge: r ", r,
                    " is too much for the ", n, " tokens of segment ", s);
    const int64_t odds = std::max<int64_t>(n / 2 - is_protected / 2, 0);
    found.merged.push_back(r);
    found.row.push_back(found.first[s] - removed[s]);
    found.padded.push_back((odds + fastmllm::kMatchColumns - 1) / fastmllm::kMatchColumns * fastmllm::kMatchColumns);
    found.even.push_back(found.even[s] + (n + 1) / 2);
    found.column.push_back(found.column[s] + found.padded[s]);
  }
  return found;
}

template <typename M, typename S>
void find_destinations(const Tensor &metric, const Segments &segments, int64_t is_protected, int64_t *destination) {
  const int64_t width = metric.size(1), evens = segments.even.back(), skip = is_protected / 2;
  std::vector<S> a(evens * width), b(width * segments.column.back(), S(0)), best(evens);
  std::vector<int64_t> index(evens);
  const auto *source = data<M>(metric);
  std::vector<std::pair<int64_t, int64_t>> blocks; // segment, first even token
  for (int64_t s = 0; s < segments.count(); ++s)
    for (int64_t first = 0; first < segments.even[s + 1] - segments.even[s]; first += kRowBlock)
      blocks.emplace_back(s, first);
  torch::stable::parallel_for(0, int64_t(blocks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [s, start] = blocks[i];
      const int64_t last = std::min(segments.tokens(s), 2 * (start + kRowBlock));
      for (int64_t n = 2 * start; n < last; ++n) {
        const M *row = source + (segments.first[s] + n) * width;
        if (n % 2 == 0)
          fastmllm::normalise(row, a.data() + (segments.even[s] + n / 2) * width, width, 1);
        else if (n / 2 >= skip)
          fastmllm::normalise(row, b.data() + segments.column[s] * width + n / 2 - skip, width, segments.padded[s]);
      }
    }
  });
  torch::stable::parallel_for(0, int64_t(blocks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [s, start] = blocks[i];
      const int64_t even = segments.even[s], last = std::min(segments.even[s + 1] - even, start + kRowBlock);
      fastmllm::match(a.data() + even * width, b.data() + segments.column[s] * width, start, last, width,
                      std::max<int64_t>(segments.tokens(s) / 2 - skip, 0), segments.padded[s], best.data() + even,
                      index.data() + even);
    }
  });
  torch::stable::parallel_for(0, segments.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s)
      fastmllm::plan(best.data() + segments.even[s], index.data() + segments.even[s], segments.tokens(s),
                     segments.merged[s], (is_protected + 1) / 2, skip, segments.row[s],
                     destination + segments.first[s]);
  });
}

template <typename T, typename S>
void merge_all(const Tensor &x, const Tensor &size, const Segments &segments, const int64_t *destination, Tensor &out,
               Tensor &new_size, Tensor &log_size) {
  const int64_t width = x.size(1);
  torch::stable::parallel_for(0, segments.count(), 1, [&](int64_t begin, int64_t end) {
    std::vector<S> sums;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t first = segments.first[s], row = segments.row[s], kept = segments.tokens(s) - segments.merged[s];
      sums.assign(kept * width, S(0));
      fastmllm::merge(data<T>(x) + first * width, data<S>(size) + first, destination + first, row,
                      data<T>(out) + row * width, data<S>(new_size) + row, data<S>(log_size) + row, sums.data(),
                      segments.tokens(s), kept, width);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_merge(const Tensor &x_in, const Tensor &metric_in,
                                                       const Tensor &size_in, const Tensor &cu_seqlens,
                                                       std::vector<int64_t> removed, int64_t, int64_t is_protected) {
  const ScalarType dtype = x_in.scalar_type();
  const bool wide = dtype == ScalarType::Double, half = dtype == ScalarType::BFloat16;
  const ScalarType sum_dtype = wide ? ScalarType::Double : ScalarType::Float;
  const Tensor x = half ? torch::stable::contiguous(x_in) : as(x_in, sum_dtype); // fp16 is widened
  const Tensor size = as(size_in, sum_dtype);
  const Segments segments = read_segments(cu_seqlens, removed, x.size(0), is_protected);
  const int64_t kept = x.size(0) - removed.back();
  Tensor out = torch::stable::new_empty(x, {kept, x.size(1)});
  Tensor new_size = torch::stable::new_empty(size, {kept});
  Tensor log_size = torch::stable::new_empty(size, {kept});
  Tensor destination = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Long);
  auto *to = data<int64_t>(destination);

  const bool half_metric = metric_in.scalar_type() == ScalarType::BFloat16;
  if (metric_in.scalar_type() == ScalarType::Double)
    find_destinations<double, double>(torch::stable::contiguous(metric_in), segments, is_protected, to);
  else if (half_metric)
    find_destinations<fastmllm::bfloat16, float>(torch::stable::contiguous(metric_in), segments, is_protected, to);
  else
    find_destinations<float, float>(as(metric_in, ScalarType::Float), segments, is_protected, to);

  if (wide)
    merge_all<double, double>(x, size, segments, to, out, new_size, log_size);
  else if (half)
    merge_all<fastmllm::bfloat16, float>(x, size, segments, to, out, new_size, log_size);
  else
    merge_all<float, float>(x, size, segments, to, out, new_size, log_size);
  return {torch::stable::to(out, dtype), torch::stable::to(new_size, size_in.scalar_type()),
          torch::stable::to(log_size, size_in.scalar_type()), destination};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmllm, CPU, m) {
  m.impl("token_merge", TORCH_BOX(&token_merge));
}
