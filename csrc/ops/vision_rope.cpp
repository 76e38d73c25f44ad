// fastmllm::vision_rope and its backward on the CPU: one pass over the tokens, split over the threads.
#include "../vision_rope.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 8; // tokens a task, and a step of it

Tensor as(const Tensor &x, ScalarType dtype) {
  return torch::stable::contiguous(torch::stable::to(x, dtype));
}

template <typename T> T *data(const Tensor &x) {
  return static_cast<T *>(x.data_ptr());
}

// packed (T, heads, D) whose tokens are `stride` apart, and its parts, each contiguous; INVERSE turns parts back into
// it
template <typename T, typename S>
void run(T *packed, int64_t stride, const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &cos,
         const Tensor &sin, int64_t head_dim, bool copy_values, bool inverse, bool interleaved) {
  const int64_t half = cos.size(1), value_size = copy_values ? v.size(1) * head_dim : 0;
  const int64_t q_size = q.size(1) * head_dim, k_size = k.size(1) * head_dim;
  T *qs = data<T>(q), *ks = data<T>(k), *vs = data<T>(v), *values = packed + q_size + k_size;
  const auto heads = [&](T *part, T *place, int64_t size, int64_t count) {
    return inverse ? fastmllm::Heads<T>{part, place, size, stride, count}
                   : fastmllm::Heads<T>{place, part, stride, size, count};
  };
  const auto q_heads = heads(qs, packed, q_size, q.size(1)), k_heads = heads(ks, packed + q_size, k_size, k.size(1));
  const S sign = inverse ? S(-1) : S(1);
  const S *c = data<S>(cos), *s = data<S>(sin);
  torch::stable::parallel_for(0, cos.size(0), kGrain, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t += kGrain) { // all parts of a few tokens while their tables are near
      const int64_t stop = std::min(last, t + kGrain);
      fastmllm::turn(q_heads, c, s, t, stop, head_dim, half, sign, interleaved);
      fastmllm::turn(k_heads, c, s, t, stop, head_dim, half, sign, interleaved);
      for (int64_t i = t; i < stop && value_size; ++i) {
        T *part = vs + i * value_size, *place = values + i * stride;
        std::memcpy(inverse ? place : part, inverse ? part : place, value_size * sizeof(T));
      }
    }
  });
}

template <typename... Args> void dispatch(ScalarType dtype, const Tensor &packed, Args &&...args) {
  if (dtype == ScalarType::Double)
    run<double, double>(data<double>(packed), packed.stride(0), args...);
  else if (dtype == ScalarType::BFloat16)
    run<fastmllm::bfloat16, float>(data<fastmllm::bfloat16>(packed), packed.stride(0), args...);
  else
    run<float, float>(data<float>(packed), packed.stride(0), args...);
}

// fp16 is widened: no loop is its own
ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Half ? ScalarType::Float : dtype;
}

ScalarType table_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? dtype : ScalarType::Float;
}

std::tuple<Tensor, Tensor, Tensor> vision_rope(const Tensor &qkv_in, const Tensor &cos, const Tensor &sin,
                                               int64_t num_heads, int64_t num_kv_heads, bool interleaved,
                                               bool copy_values) {
  const ScalarType dtype = compute_dtype(qkv_in.scalar_type()), table = table_dtype(dtype);
  const int64_t tokens = qkv_in.size(0), values = qkv_in.size(1) - num_heads - num_kv_heads, dim = qkv_in.size(2);
  Tensor qkv = torch::stable::to(qkv_in, dtype);
  if (qkv.stride(2) != 1 || qkv.stride(1) != dim) // rows may be strided
    qkv = torch::stable::contiguous(qkv);
  const Tensor q = torch::stable::new_empty(qkv, {tokens, num_heads, dim});
  const Tensor k = torch::stable::new_empty(qkv, {tokens, num_kv_heads, dim});
  const Tensor v =
      copy_values ? torch::stable::new_empty(qkv, {tokens, values, dim}) : torch::stable::new_empty(qkv, {int64_t(0)});
  dispatch(dtype, qkv, q, k, v, as(cos, table), as(sin, table), dim, copy_values, false, interleaved);
  const ScalarType out = qkv_in.scalar_type();
  return {torch::stable::to(q, out), torch::stable::to(k, out), torch::stable::to(v, out)};
}

Tensor vision_rope_bwd(const Tensor &grad_q, const Tensor &grad_k, const Tensor &grad_v, const Tensor &cos,
                       const Tensor &sin, bool interleaved) {
  const ScalarType dtype = compute_dtype(grad_q.scalar_type()), table = table_dtype(dtype);
  const Tensor q = as(grad_q, dtype), k = as(grad_k, dtype), v = as(grad_v, dtype);
  const int64_t dim = q.size(2);
  const Tensor packed = torch::stable::new_empty(q, {q.size(0), q.size(1) + k.size(1) + v.size(1), dim});
  dispatch(dtype, packed, q, k, v, as(cos, table), as(sin, table), dim, true, true, interleaved);
  return torch::stable::to(packed, grad_q.scalar_type());
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmllm, CPU, m) {
  m.impl("vision_rope", TORCH_BOX(&vision_rope));
  m.impl("vision_rope_bwd", TORCH_BOX(&vision_rope_bwd));
}
