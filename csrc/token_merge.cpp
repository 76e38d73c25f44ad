// Torch-free loops of token_merge (see kernels/token_merge.py for the algorithm).
#include "token_merge.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace fastmllm {
namespace {

template <typename T, typename S>
FASTMLLM_INLINE void normalise_row(const T *__restrict__ row, S *__restrict__ unit, int64_t width, int64_t stride) {
  S sum = 0;
  for (int64_t i = 0; i < width; ++i)
    sum += S(widen(row[i])) * S(widen(row[i]));
  const S inverse = S(1) / std::max(std::sqrt(sum), S(1e-12));
  for (int64_t i = 0; i < width; ++i)
    unit[i * stride] = S(widen(row[i])) * inverse;
}

constexpr double kUnknown = -2; // a cosine that is NaN, less than any other

// A tile of kRows x kMatchColumns accumulators stays in registers. NaN is never larger.
template <typename S>
FASTMLLM_INLINE void match_rows(const S *__restrict__ a, const S *__restrict__ b, int64_t first, int64_t last,
                                int64_t width, int64_t columns, int64_t padded, S *__restrict__ best,
                                int64_t *__restrict__ index) {
  constexpr int kRows = 6;
  for (int64_t row = first; row < last; row += kRows) {
    const int rows = int(std::min<int64_t>(kRows, last - row));
    for (int q = 0; q < rows; ++q) {
      best[row + q] = S(kUnknown);
      index[row + q] = 0;
    }
    for (int64_t start = 0; start < columns; start += kMatchColumns) {
      S sums[kRows][kMatchColumns] = {};
      for (int64_t c = 0; c < width; ++c) {
        const S *__restrict__ right = b + c * padded + start;
        for (int q = 0; q < kRows; ++q) {
          const S left = a[(row + (q < rows ? q : 0)) * width + c];
#pragma GCC ivdep
          for (int t = 0; t < kMatchColumns; ++t)
            sums[q][t] += left * right[t];
        }
      }
      const int valid = int(std::min<int64_t>(kMatchColumns, columns - start));
      for (int q = 0; q < rows; ++q) {
        S largest = S(kUnknown);
        for (int t = 0; t < valid; ++t)
          largest = sums[q][t] > largest ? sums[q][t] : largest;
        if (largest > best[row + q]) { // strictly: of equal partners the first stays
          int t = 0;
          while (sums[q][t] != largest)
            ++t;
          best[row + q] = largest;
          index[row + q] = start + t;
        }
      }
    }
  }
}

template <typename S>
void plan_segment(const S *best, const int64_t *index, int64_t tokens, int64_t r, int64_t fixed, int64_t skip,
                  int64_t row, int64_t *destination) {
  const int64_t evens = (tokens + 1) / 2;
  std::vector<int64_t> order(std::max<int64_t>(evens - fixed, 0));
  std::iota(order.begin(), order.end(), fixed);
  std::nth_element(order.begin(), order.begin() + r, order.end(),
                   [&](int64_t x, int64_t y) { return best[x] > best[y] || (best[x] == best[y] && x < y); });
  std::vector<char> merged(evens, 0);
  for (int64_t i = 0; i < r; ++i)
    merged[order[i]] = 1;
  int64_t place = row;
  for (int64_t n = 0; n < tokens; ++n)
    if (n % 2 == 1 || !merged[n / 2])
      destination[n] = place++;
  for (int64_t i = 0; i < evens; ++i)
    if (merged[i])
      destination[2 * i] = destination[2 * (index[i] + skip) + 1];
}

template <typename T, typename S>
FASTMLLM_INLINE void merge_segment(const T *__restrict__ x, const S *__restrict__ size,
                                   const int64_t *__restrict__ destination, int64_t first, T *__restrict__ out,
                                   S *__restrict__ new_size, S *__restrict__ log_size, S *__restrict__ sums,
                                   int64_t tokens, int64_t kept, int64_t width) {
  std::fill(new_size, new_size + kept, S(0));
  for (int64_t n = 0; n < tokens; ++n) {
    const int64_t to = destination[n] - first;
    const S weight = size[n];
    S *__restrict__ row = sums + to * width;
    const T *__restrict__ source = x + n * width;
    new_size[to] += weight;
#pragma GCC ivdep
    for (int64_t d = 0; d < width; ++d)
      row[d] += weight * S(widen(source[d]));
  }
  for (int64_t k = 0; k < kept; ++k) {
    log_size[k] = std::log(new_size[k]);
    const S inverse = S(1) / new_size[k];
#pragma GCC ivdep
    for (int64_t d = 0; d < width; ++d)
      narrow(sums[k * width + d] * inverse, out[k * width + d]);
  }
}

} // namespace

FASTMLLM_CLONES void normalise(const float *row, float *unit, int64_t width, int64_t stride) {
  normalise_row(row, unit, width, stride);
}
FASTMLLM_CLONES void normalise(const bfloat16 *row, float *unit, int64_t width, int64_t stride) {
  normalise_row(row, unit, width, stride);
}
FASTMLLM_CLONES void normalise(const double *row, double *unit, int64_t width, int64_t stride) {
  normalise_row(row, unit, width, stride);
}

FASTMLLM_CLONES void match(const float *a, const float *b, int64_t first, int64_t last, int64_t width, int64_t columns,
                           int64_t padded, float *best, int64_t *index) {
  match_rows(a, b, first, last, width, columns, padded, best, index);
}
FASTMLLM_CLONES void match(const double *a, const double *b, int64_t first, int64_t last, int64_t width,
                           int64_t columns, int64_t padded, double *best, int64_t *index) {
  match_rows(a, b, first, last, width, columns, padded, best, index);
}

void plan(const float *best, const int64_t *index, int64_t tokens, int64_t r, int64_t fixed, int64_t skip, int64_t row,
          int64_t *destination) {
  plan_segment(best, index, tokens, r, fixed, skip, row, destination);
}
void plan(const double *best, const int64_t *index, int64_t tokens, int64_t r, int64_t fixed, int64_t skip, int64_t row,
          int64_t *destination) {
  plan_segment(best, index, tokens, r, fixed, skip, row, destination);
}

FASTMLLM_CLONES void merge(const float *x, const float *size, const int64_t *destination, int64_t row, float *out,
                           float *new_size, float *log_size, float *sums, int64_t tokens, int64_t kept, int64_t width) {
  merge_segment(x, size, destination, row, out, new_size, log_size, sums, tokens, kept, width);
}
FASTMLLM_CLONES void merge(const bfloat16 *x, const float *size, const int64_t *destination, int64_t row, bfloat16 *out,
                           float *new_size, float *log_size, float *sums, int64_t tokens, int64_t kept, int64_t width) {
  merge_segment(x, size, destination, row, out, new_size, log_size, sums, tokens, kept, width);
}
FASTMLLM_CLONES void merge(const double *x, const double *size, const int64_t *destination, int64_t row, double *out,
                           double *new_size, double *log_size, double *sums, int64_t tokens, int64_t kept,
                           int64_t width) {
  merge_segment(x, size, destination, row, out, new_size, log_size, sums, tokens, kept, width);
}

} // namespace fastmllm
