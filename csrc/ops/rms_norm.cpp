// fastmllm::rms_norm and its backward on the CPU: blocks of rows over the threads.
#include "../rms_norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using fastmllm::bfloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t kGrain = 1 << 15; // elements a task
constexpr int64_t kLeast = 64;      // rows that share a partial sum of dw, at least; then at most so many partial sums:
constexpr int64_t kBlocks = 64;     // sizes alone decide, so the number of threads does not change a result

Tensor as(const Tensor &x, ScalarType dtype) {
  return torch::stable::contiguous(torch::stable::to(x, dtype));
}

Maybe as(const Maybe &x, ScalarType dtype) {
  return x ? Maybe(as(*x, dtype)) : std::nullopt;
}

template <typename T> T *data(const Tensor &x) {
  return static_cast<T *>(x.data_ptr());
}

template <typename T> T *data(const Maybe &x) {
  return x ? data<T>(*x) : nullptr;
}

Tensor nothing(const Tensor &like) {
  return torch::stable::new_empty(like, {int64_t(0)});
}

ScalarType sum_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? dtype : ScalarType::Float;
}

// (N,) in S, with the offset added
template <typename S> std::vector<S> weights(const Tensor &weight_in, double offset, ScalarType dtype) {
  const Tensor weight = as(weight_in, dtype);
  std::vector<S> values(data<S>(weight), data<S>(weight) + weight.numel());
  for (S &value : values)
    value += S(offset);
  return values;
}

using Forward = std::tuple<Tensor, Tensor, Tensor>; // y, h, rstd

template <typename T>
Forward forward(const Tensor &x_in, const Tensor &weight_in, const Maybe &residual_in, const Maybe &scale_in,
                double eps, double offset) {
  using S = typename fastmllm::NormForward<T>::S;
  const ScalarType dtype = x_in.scalar_type(), wide = sum_dtype(dtype);
  const Tensor x = torch::stable::contiguous(x_in);
  const Maybe residual = as(residual_in, dtype), scale = as(scale_in, wide);
  const std::vector<S> weight = weights<S>(weight_in, offset, wide);
  const int64_t n = int64_t(weight.size()), m = n ? x.numel() / n : 0;
  const std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end()), rows(shape.begin(), shape.end() - 1);
  const Tensor y = torch::stable::new_empty(x, shape), rstd = torch::stable::new_empty(x, rows, wide);
  const Tensor h = residual ? torch::stable::new_empty(x, shape) : nothing(x);
  const fastmllm::NormForward<T> norm{
      n, S(eps), data<T>(x), data<T>(residual), weight.data(), data<S>(scale), data<T>(y), data<T>(h), data<S>(rstd)};
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(n, 1));
  torch::stable::parallel_for(0, m, grain, [&](int64_t first, int64_t last) {
    std::vector<S> scratch(std::max(n, fastmllm::kNormScratch));
    fastmllm::norm_forward(norm, first, last, scratch.data());
  });
  return {y, h, rstd};
}

Forward rms_norm(const Tensor &x, const Tensor &weight, const Maybe &residual, const Maybe &scale, double eps,
                 double offset) {
  const ScalarType dtype = x.scalar_type();
  if (dtype == ScalarType::Double)
    return forward<double>(x, weight, residual, scale, eps, offset);
  if (dtype == ScalarType::BFloat16)
    return forward<bfloat16>(x, weight, residual, scale, eps, offset);
  if (dtype == ScalarType::Float)
    return forward<float>(x, weight, residual, scale, eps, offset);
  // fp16 is widened; the sum is rounded before it is normalised
  Tensor h = nothing(x), input = as(x, ScalarType::Float);
  if (residual) {
    const Maybe added = as(residual, ScalarType::Float);
    h = torch::stable::to(std::get<1>(forward<float>(input, weight, added, scale, eps, offset)), dtype);
    input = torch::stable::to(h, ScalarType::Float);
  }
  const auto [y, none, rstd] = forward<float>(input, weight, std::nullopt, std::nullopt, eps, offset);
  return {torch::stable::to(y, dtype), h, rstd};
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>; // dh, dx, dw, dscale

template <typename T>
Backward backward(const Tensor &grad_y, const Maybe &grad_h, const Tensor &h_in, const Maybe &x_in,
                  const Tensor &weight_in, const Maybe &scale_in, const Tensor &rstd_in, double offset,
                  bool weight_grad) {
  using S = typename fastmllm::NormBackward<T>::S;
  const ScalarType dtype = h_in.scalar_type(), wide = sum_dtype(dtype);
  const Tensor dy = as(grad_y, dtype), h = torch::stable::contiguous(h_in), rstd = as(rstd_in, wide);
  const Maybe grad_sum = as(grad_h, dtype), x = as(x_in, dtype), scale = as(scale_in, wide);
  const std::vector<S> weight = weights<S>(weight_in, offset, wide);
  const int64_t n = int64_t(weight.size()), m = n ? h.numel() / n : 0;
  const std::vector<int64_t> shape(h.sizes().begin(), h.sizes().end());
  const Tensor dh = torch::stable::new_empty(h, shape), dx = scale ? torch::stable::new_empty(h, shape) : nothing(h);
  const fastmllm::NormBackward<T> norm{n,           data<T>(dy),   data<T>(grad_sum), data<T>(h),
                                       data<T>(x),  weight.data(), data<S>(scale),    data<S>(rstd),
                                       data<T>(dh), data<T>(dx)};
  const int64_t block = std::max(kLeast, (m + kBlocks - 1) / kBlocks), blocks = (m + block - 1) / block;
  const int64_t parts = std::max<int64_t>(blocks, 1);
  std::vector<S> dw(parts * n), dscale(x ? parts * n : 0);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<S> row(n);
    for (int64_t b = begin; b < end; ++b)
      fastmllm::norm_backward(norm, b * block, std::min(m, (b + 1) * block), dw.data() + b * n,
                              x ? dscale.data() + b * n : nullptr, row.data());
  });
  const auto gather = [&](std::vector<S> &partial) {
    for (int64_t b = 1; b < blocks; ++b)
      for (int64_t c = 0; c < n; ++c)
        partial[c] += partial[b * n + c];
    const Tensor out = torch::stable::new_empty(h, {n}, wide);
    std::copy(partial.begin(), partial.begin() + n, data<S>(out));
    return torch::stable::to(out, weight_in.scalar_type());
  };
  return {dh, dx, weight_grad ? gather(dw) : nothing(weight_in), x ? gather(dscale) : nothing(weight_in)};
}

Backward rms_norm_bwd(const Tensor &grad_y, const Maybe &grad_h, const Tensor &h, const Maybe &x, const Tensor &weight,
                      const Maybe &scale, const Tensor &rstd, double offset, bool weight_grad) {
  const ScalarType dtype = h.scalar_type();
  if (dtype == ScalarType::Double)
    return backward<double>(grad_y, grad_h, h, x, weight, scale, rstd, offset, weight_grad);
  if (dtype == ScalarType::BFloat16)
    return backward<bfloat16>(grad_y, grad_h, h, x, weight, scale, rstd, offset, weight_grad);
  const Tensor wide = as(h, ScalarType::Float);
  const auto [dh, dx, dw, dscale] = backward<float>(grad_y, grad_h, wide, x, weight, scale, rstd, offset, weight_grad);
  return {torch::stable::to(dh, dtype), torch::stable::to(dx, dtype), dw, dscale};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmllm, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd));
}
