// Loops of rms_norm: one pass over the rows each way, statistics and sums in fp32 (fp64 for fp64).
#pragma once
#include "simd.h"

namespace fastmllm {

template <typename T> struct Sum {
  using type = float;
};
template <> struct Sum<double> {
  using type = double;
};

// h = residual + scale * x; y = h * rstd * weight
template <typename T> struct NormForward {
  using S = typename Sum<T>::type;
  int64_t width;
  S eps;
  const T *x, *residual;   // (M, N); residual may be null, then h is not written
  const S *weight, *scale; // (N,); scale may be null
  T *y, *h;                // (M, N)
  S *rstd;                 // (M,)
};

template <typename T> struct NormBackward {
  using S = typename Sum<T>::type;
  int64_t width;
  const T *dy, *grad_h, *h, *x; // (M, N); grad_h may be null, x is null where dscale is not wanted
  const S *weight, *scale;      // (N,); scale may be null, then dx is not written
  const S *rstd;                // (M,)
  T *dh, *dx;                   // (M, N)
};

// Rows [first, last); `rows` is scratch of max(N, kNormScratch).
constexpr int64_t kNormScratch = 4096;
void norm_forward(const NormForward<float> &norm, int64_t first, int64_t last, float *rows);
void norm_forward(const NormForward<bfloat16> &norm, int64_t first, int64_t last, float *rows);
void norm_forward(const NormForward<double> &norm, int64_t first, int64_t last, double *rows);

// Rows [first, last); dw and dscale (with x) are (N,) and added to; `row` is scratch of N.
void norm_backward(const NormBackward<float> &norm, int64_t first, int64_t last, float *dw, float *dscale, float *row);
void norm_backward(const NormBackward<bfloat16> &norm, int64_t first, int64_t last, float *dw, float *dscale,
                   float *row);
void norm_backward(const NormBackward<double> &norm, int64_t first, int64_t last, double *dw, double *dscale,
                   double *row);

} // namespace fastmllm
