// fastmllm::token_merge on the CPU: one pass to match, one to merge, images and row blocks over the threads.
#include "../token_merge.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
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

template <typename M, typename S> void find_destinations(const Tensor &metric, int64_t r, int64_t *destination) {
  const int64_t images = metric.size(0), tokens = metric.size(1), width = metric.size(2);
  const int64_t evens = (tokens + 1) / 2, odds = tokens / 2;
  const int64_t padded = (odds + fastmllm::kMatchColumns - 1) / fastmllm::kMatchColumns * fastmllm::kMatchColumns;
  std::vector<S> a(images * evens * width), b(images * width * padded, S(0)), best(images * evens);
  std::vector<int64_t> index(images * evens);
  const auto *source = data<M>(metric);
  torch::stable::parallel_for(0, images * tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / tokens, n = i % tokens;
      if (n % 2 == 0)
        fastmllm::normalise(source + i * width, a.data() + (image * evens + n / 2) * width, width, 1);
      else
        fastmllm::normalise(source + i * width, b.data() + image * width * padded + n / 2, width, padded);
    }
  });
  const int64_t blocks = (evens + kRowBlock - 1) / kRowBlock;
  torch::stable::parallel_for(0, images * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / blocks, first = (i % blocks) * kRowBlock;
      fastmllm::match(a.data() + image * evens * width, b.data() + image * width * padded, first,
                      std::min(evens, first + kRowBlock), width, odds, padded, best.data() + image * evens,
                      index.data() + image * evens);
    }
  });
  torch::stable::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      fastmllm::plan(best.data() + i * evens, index.data() + i * evens, tokens, r, destination + i * tokens);
  });
}

template <typename T, typename S>
void merge_all(const Tensor &x, const Tensor &size, const int64_t *destination, Tensor &out, Tensor &new_size) {
  const int64_t tokens = x.size(1), width = x.size(2), kept = out.size(1);
  torch::stable::parallel_for(0, x.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<S> sums(kept * width);
    for (int64_t i = begin; i < end; ++i) {
      std::fill(sums.begin(), sums.end(), S(0));
      fastmllm::merge(data<T>(x) + i * tokens * width, data<S>(size) + i * tokens, destination + i * tokens,
                      data<T>(out) + i * kept * width, data<S>(new_size) + i * kept, sums.data(), tokens, kept, width);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> token_merge(const Tensor &x_in, const Tensor &metric_in, const Tensor &size_in,
                                               int64_t r) {
  const ScalarType dtype = x_in.scalar_type();
  const bool wide = dtype == ScalarType::Double, half = dtype == ScalarType::BFloat16;
  const ScalarType sum_dtype = wide ? ScalarType::Double : ScalarType::Float;
  const Tensor x = half ? torch::stable::contiguous(x_in) : as(x_in, sum_dtype); // fp16 is widened
  const Tensor size = as(size_in, sum_dtype);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1) - r, x.size(2)});
  Tensor new_size = torch::stable::new_empty(size, {x.size(0), x.size(1) - r});
  Tensor destination = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Long);
  auto *to = data<int64_t>(destination);

  const bool half_metric = metric_in.scalar_type() == ScalarType::BFloat16;
  if (metric_in.scalar_type() == ScalarType::Double)
    find_destinations<double, double>(torch::stable::contiguous(metric_in), r, to);
  else if (half_metric)
    find_destinations<fastmllm::bfloat16, float>(torch::stable::contiguous(metric_in), r, to);
  else
    find_destinations<float, float>(as(metric_in, ScalarType::Float), r, to);

  if (wide)
    merge_all<double, double>(x, size, to, out, new_size);
  else if (half)
    merge_all<fastmllm::bfloat16, float>(x, size, to, out, new_size);
  else
    merge_all<float, float>(x, size, to, out, new_size);
  return {torch::stable::to(out, dtype), torch::stable::to(new_size, size_in.scalar_type()), destination};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmllm, CPU, m) {
  m.impl("token_merge", TORCH_BOX(&token_merge));
}
