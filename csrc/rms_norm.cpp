// Torch-free loops of rms_norm (see kernels/_norm.py for the formulas).
#include "rms_norm.h"

#include <algorithm>
#include <cmath>

namespace fastmllm {
namespace {

constexpr int64_t kLanes = 64; // independent sums, in registers: a compiler may not reorder one
constexpr int64_t kRows = 4;   // rows whose chains of sums overlap

template <typename S> FASTMLLM_INLINE S total(S *lanes) {
  for (int64_t half = kLanes / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i)
      lanes[i] += lanes[i + half];
  return lanes[0];
}

template <typename S> FASTMLLM_INLINE S sum_of_squares(const S *__restrict__ row, int64_t width) {
  S lanes[kLanes] = {};
  int64_t start = 0;
  for (; start + kLanes <= width; start += kLanes)
#pragma GCC ivdep
    for (int64_t t = 0; t < kLanes; ++t)
      lanes[t] += row[start + t] * row[start + t];
  for (; start < width; ++start)
    lanes[0] += row[start] * row[start];
  return total(lanes);
}

// The row that is normalised, in S; with a residual it is what was stored as h.
template <bool kResidual, bool kScale, typename T, typename S>
FASTMLLM_INLINE void load_row(const T *__restrict__ x, const T *__restrict__ residual, const S *__restrict__ scale,
                              T *__restrict__ h, S *__restrict__ row, int64_t width) {
#pragma GCC ivdep
  for (int64_t i = 0; i < width; ++i) {
    const S value = (kScale ? S(widen(x[i])) * scale[i] : S(widen(x[i]))) + (kResidual ? S(widen(residual[i])) : S(0));
    row[i] = value;
    if (kResidual)
      narrow(value, h[i]);
  }
  if (kResidual && sizeof(T) < sizeof(S))
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i)
      row[i] = widen(h[i]);
}

template <bool kResidual, bool kScale, typename T, typename S>
FASTMLLM_INLINE void forward_rows(const NormForward<T> &norm, int64_t first, int64_t last, S *__restrict__ rows) {
  const int64_t n = norm.width;
  const S *__restrict__ weight = norm.weight;
  const int64_t batch = std::max<int64_t>(1, std::min(kRows, kNormScratch / n));
  for (int64_t start = first; start < last; start += batch) {
    const int64_t count = std::min(batch, last - start);
    for (int64_t q = 0; q < count; ++q) {
      const int64_t at = (start + q) * n;
      load_row<kResidual, kScale>(norm.x + at, kResidual ? norm.residual + at : nullptr, norm.scale,
                                  kResidual ? norm.h + at : nullptr, rows + q * n, n);
    }
    for (int64_t q = 0; q < count; ++q)
      norm.rstd[start + q] = S(1) / std::sqrt(sum_of_squares(rows + q * n, n) / S(n) + norm.eps);
    for (int64_t q = 0; q < count; ++q) {
      const S *__restrict__ row = rows + q * n;
      T *__restrict__ y = norm.y + (start + q) * n;
      const S rstd = norm.rstd[start + q];
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i)
        narrow(row[i] * rstd * weight[i], y[i]);
    }
  }
}

template <typename T, typename S>
FASTMLLM_INLINE void forward(const NormForward<T> &norm, int64_t first, int64_t last, S *rows) {
  if (norm.scale)
    forward_rows<true, true>(norm, first, last, rows);
  else if (norm.residual)
    forward_rows<true, false>(norm, first, last, rows);
  else
    forward_rows<false, false>(norm, first, last, rows);
}

// The sum over a row of dy * weight times the normalised row, then the row's gradient. Row by row: a block of columns
// over several rows is too many streams for the prefetcher.
template <bool kGradH, bool kScale, typename T, typename S>
FASTMLLM_INLINE void backward_row(const T *__restrict__ dy, const T *__restrict__ h, const S *__restrict__ weight,
                                  const T *__restrict__ grad_h, S rstd, T *__restrict__ dh, S *__restrict__ dw,
                                  S *__restrict__ row, int64_t width) {
  S lanes[kLanes] = {};
  int64_t start = 0;
  for (; start + kLanes <= width; start += kLanes)
#pragma GCC ivdep
    for (int64_t t = 0; t < kLanes; ++t)
      lanes[t] += widen(dy[start + t]) * weight[start + t] * widen(h[start + t]);
  for (; start < width; ++start)
    lanes[0] += widen(dy[start]) * weight[start] * widen(h[start]);
  const S slope = total(lanes) * rstd / S(width);
#pragma GCC ivdep
  for (int64_t i = 0; i < width; ++i) {
    const S grad = widen(dy[i]), normed = widen(h[i]) * rstd;
    const S out = (grad * weight[i] - normed * slope) * rstd + (kGradH ? S(widen(grad_h[i])) : S(0));
    narrow(out, dh[i]);
    if (kScale)
      row[i] = out;
    dw[i] += grad * normed;
  }
}

template <typename T, typename S>
FASTMLLM_INLINE void scale_row(const S *__restrict__ dh, const S *__restrict__ scale, const T *__restrict__ x,
                               T *__restrict__ dx, S *__restrict__ dscale, int64_t width) {
#pragma GCC ivdep
  for (int64_t i = 0; i < width; ++i)
    narrow(dh[i] * scale[i], dx[i]);
  if (x)
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i)
      dscale[i] += dh[i] * widen(x[i]);
}

template <bool kGradH, bool kScale, typename T, typename S>
FASTMLLM_INLINE void backward_rows(const NormBackward<T> &norm, int64_t first, int64_t last, S *dw, S *dscale, S *row) {
  const int64_t n = norm.width;
  for (int64_t m = first; m < last; ++m) {
    backward_row<kGradH, kScale>(norm.dy + m * n, norm.h + m * n, norm.weight, kGradH ? norm.grad_h + m * n : nullptr,
                                 norm.rstd[m], norm.dh + m * n, dw, row, n);
    if (kScale)
      scale_row(row, norm.scale, norm.x ? norm.x + m * n : nullptr, norm.dx + m * n, dscale, n);
  }
}

template <typename T, typename S>
FASTMLLM_INLINE void backward(const NormBackward<T> &norm, int64_t first, int64_t last, S *dw, S *dscale, S *row) {
  if (norm.scale && norm.grad_h)
    backward_rows<true, true>(norm, first, last, dw, dscale, row);
  else if (norm.scale)
    backward_rows<false, true>(norm, first, last, dw, dscale, row);
  else if (norm.grad_h)
    backward_rows<true, false>(norm, first, last, dw, dscale, row);
  else
    backward_rows<false, false>(norm, first, last, dw, dscale, row);
}

} // namespace

FASTMLLM_CLONES void norm_forward(const NormForward<float> &norm, int64_t first, int64_t last, float *rows) {
  forward(norm, first, last, rows);
}
FASTMLLM_CLONES void norm_forward(const NormForward<bfloat16> &norm, int64_t first, int64_t last, float *rows) {
  forward(norm, first, last, rows);
}
FASTMLLM_CLONES void norm_forward(const NormForward<double> &norm, int64_t first, int64_t last, double *rows) {
  forward(norm, first, last, rows);
}

FASTMLLM_CLONES void norm_backward(const NormBackward<float> &norm, int64_t first, int64_t last, float *dw,
                                   float *dscale, float *row) {
  backward(norm, first, last, dw, dscale, row);
}
FASTMLLM_CLONES void norm_backward(const NormBackward<bfloat16> &norm, int64_t first, int64_t last, float *dw,
                                   float *dscale, float *row) {
  backward(norm, first, last, dw, dscale, row);
}
FASTMLLM_CLONES void norm_backward(const NormBackward<double> &norm, int64_t first, int64_t last, double *dw,
                                   double *dscale, double *row) {
  backward(norm, first, last, dw, dscale, row);
}

} // namespace fastmllm
