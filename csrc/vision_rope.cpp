#include "vision_rope.h"

#include <algorithm>

namespace fastmllm {

namespace {

template <typename T, typename S>
FASTMLLM_INLINE void turn_halves(const T *__restrict__ x, T *__restrict__ y, const S *__restrict__ cos,
                                 const S *__restrict__ sin, int64_t half, S sign) {
#pragma GCC ivdep
  for (int64_t i = 0; i < half; ++i) {
    const S a = widen(x[i]), b = widen(x[i + half]), s = sign * sin[i];
    narrow(a * cos[i] - b * s, y[i]);
    narrow(b * cos[i] + a * s, y[i + half]);
  }
}

template <typename T, typename S>
FASTMLLM_INLINE void turn_pairs(const T *__restrict__ x, T *__restrict__ y, const S *__restrict__ cos,
                                const S *__restrict__ sin, int64_t half, S sign) {
#pragma GCC ivdep
  for (int64_t i = 0; i < half; ++i) {
    const S a = widen(x[2 * i]), b = widen(x[2 * i + 1]), s = sign * sin[i];
    narrow(a * cos[i] - b * s, y[2 * i]);
    narrow(b * cos[i] + a * s, y[2 * i + 1]);
  }
}

template <typename T, typename S>
FASTMLLM_INLINE void turn_tokens(const Heads<T> &x, const S *cos, const S *sin, int64_t first, int64_t last,
                                 int64_t head_dim, int64_t half, S sign, bool interleaved) {
  for (int64_t t = first; t < last; ++t) {
    const T *source = x.source + t * x.source_stride;
    T *target = x.target + t * x.target_stride;
    for (int64_t h = 0; h < x.heads; ++h, source += head_dim, target += head_dim) {
      if (interleaved)
        turn_pairs(source, target, cos + t * half, sin + t * half, half, sign);
      else
        turn_halves(source, target, cos + t * half, sin + t * half, half, sign);
      if (2 * half < head_dim)
        std::copy(source + 2 * half, source + head_dim, target + 2 * half);
    }
  }
}

// The usual sizes as constants: their loops have no remainder that depends on the run.
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
