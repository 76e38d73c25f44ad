#include "vision_rope.h"

#include <algorithm>

namespace fastmllm {

namespace {

// Turn `count` pairs from pair i on.
template <bool INTERLEAVED, typename T, typename S>
FASTMLLM_INLINE void turn_pairs(const T *__restrict__ x, T *__restrict__ y, const S *__restrict__ cos,
                                const S *__restrict__ sin, int64_t i, int64_t count, int64_t half, S sign) {
  const int64_t step = INTERLEAVED ? 2 : 1, other = INTERLEAVED ? 1 : half;
  x += step * i, y += step * i, cos += i, sin += i;
#pragma GCC ivdep
  for (int64_t n = 0; n < count; ++n) {
    const S a = widen(x[step * n]), b = widen(x[step * n + other]), s = sign * sin[n];
    narrow(a * cos[n] - b * s, y[step * n]);
    narrow(b * cos[n] + a * s, y[step * n + other]);
  }
}

template <bool INTERLEAVED, typename T, typename S>
FASTMLLM_INLINE void turn_head(const T *x, T *y, const S *cos, const S *sin, int64_t half, S sign) {
  constexpr int64_t block = 32;
  if (sizeof(T) > 2 || half < block) {
    turn_pairs<INTERLEAVED>(x, y, cos, sin, 0, half, half, sign);
    return;
  }
  // The compiler turns 32 pairs of bf16 at once and the remainder one by one: rather turn some twice, to the same
  // values.
  for (int64_t i = 0; i + block < half; i += block)
    turn_pairs<INTERLEAVED>(x, y, cos, sin, i, block, half, sign);
  turn_pairs<INTERLEAVED>(x, y, cos, sin, half - block, block, half, sign);
}

template <typename T, typename S>
FASTMLLM_INLINE void turn_tokens(const Heads<T> &x, const S *cos, const S *sin, int64_t first, int64_t last,
                                 int64_t head_dim, int64_t half, S sign, bool interleaved) {
  for (int64_t t = first; t < last; ++t) {
    const T *source = x.source + t * x.source_stride;
    T *target = x.target + t * x.target_stride;
    for (int64_t h = 0; h < x.heads; ++h, source += head_dim, target += head_dim) {
      if (interleaved)
        turn_head<true>(source, target, cos + t * half, sin + t * half, half, sign);
      else
        turn_head<false>(source, target, cos + t * half, sin + t * half, half, sign);
      if (2 * half < head_dim)
        std::copy(source + 2 * half, source + head_dim, target + 2 * half);
    }
  }
}

// The usual sizes as constants: the compiler lays their loops out in full.
template <typename T, typename S>
FASTMLLM_INLINE void turn_sizes(const Heads<T> &x, const S *cos, const S *sin, int64_t first, int64_t last,
                                int64_t head_dim, int64_t half, S sign, bool interleaved) {
  if (half == 32)
    turn_tokens(x, cos, sin, first, last, head_dim, 32, sign, interleaved);
  else if (half == 36)
    turn_tokens(x, cos, sin, first, last, head_dim, 36, sign, interleaved);
  else if (half == 40)
    turn_tokens(x, cos, sin, first, last, head_dim, 40, sign, interleaved);
  else if (half == 64)
    turn_tokens(x, cos, sin, first, last, head_dim, 64, sign, interleaved);
  else
    turn_tokens(x, cos, sin, first, last, head_dim, half, sign, interleaved);
}

} // namespace

FASTMLLM_CLONES void turn(const Heads<float> &x, const float *cos, const float *sin, int64_t first, int64_t last,
                          int64_t head_dim, int64_t half, float sign, bool interleaved) {
  turn_sizes(x, cos, sin, first, last, head_dim, half, sign, interleaved);
}
FASTMLLM_CLONES void turn(const Heads<bfloat16> &x, const float *cos, const float *sin, int64_t first, int64_t last,
                          int64_t head_dim, int64_t half, float sign, bool interleaved) {
  turn_sizes(x, cos, sin, first, last, head_dim, half, sign, interleaved);
}
FASTMLLM_CLONES void turn(const Heads<double> &x, const double *cos, const double *sin, int64_t first, int64_t last,
                          int64_t head_dim, int64_t half, double sign, bool interleaved) {
  turn_sizes(x, cos, sin, first, last, head_dim, half, sign, interleaved);
}

} // namespace fastmllm
