// Torch-free loops of greedy_diverse (see kernels/greedy_diverse.py for the formulas).
#include "greedy_diverse.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

namespace fastmllm {
namespace {

constexpr double kSpanned = 1e-5, kSame = 1e-6, kWorst = -3e38, kOne = 1 << 20;

// The positive part of a cosine in fixed point, NaN as 0.
template <typename S> FASTMLLM_INLINE int32_t fixed(S cosine) {
  return int32_t((cosine > 0 ? cosine : S(0)) * S(kOne) + S(0.5));
}

// The cosine of a token with itself, without rounding: 1, or 0 of a token of zeros.
template <typename S> FASTMLLM_INLINE S itself(S cosine) {
  return cosine > S(0.5) ? S(1) : cosine;
}

template <typename T, typename S>
FASTMLLM_INLINE S unit_of(const T *__restrict__ row, S *__restrict__ unit, int64_t n) {
  constexpr int kLanes = 16;
  S sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int q = 0; q < kLanes; ++q)
      sums[q] += S(widen(row[i + q])) * S(widen(row[i + q]));
  S sum = 0;
  for (; i < n; ++i)
    sum += S(widen(row[i])) * S(widen(row[i]));
  for (int q = 0; q < kLanes; ++q)
    sum += sums[q];
  const S infinity = std::numeric_limits<S>::infinity();
  const S norm = sum < infinity ? std::sqrt(sum) : std::numeric_limits<S>::quiet_NaN();
  const S inverse = S(1) / std::max(norm, S(1e-12));
  for (i = 0; i < n; ++i)
    unit[i] = S(widen(row[i])) * inverse;
  return norm;
}

template <typename S>
FASTMLLM_INLINE void pack_tile(const S *__restrict__ unit, S *__restrict__ packed, int64_t tile, int64_t tokens,
                               int64_t width) {
  S *__restrict__ out = packed + tile * width * kCosineColumns;
  for (int64_t t = 0; t < kCosineColumns; ++t) {
    const int64_t token = tile * kCosineColumns + t;
    for (int64_t d = 0; d < width; ++d)
      out[d * kCosineColumns + t] = token < tokens ? unit[token * width + d] : S(0);
  }
}

// kRows x kCosineColumns accumulators stay in registers, kDepth rows of the packed tile in the L2.
template <typename S>
FASTMLLM_INLINE void rows_of(const S *__restrict__ unit, const S *__restrict__ packed, int64_t first, int64_t last,
                             int64_t tokens, int64_t width, Diversity method, S *__restrict__ matrix,
                             S *__restrict__ nearest, int64_t *__restrict__ gain) {
  constexpr int kRows = 6, kDepth = 512;
  S products[kCosineRows][kCosineColumns];
  for (int64_t start = matrix ? first / kCosineColumns * kCosineColumns : 0; start < tokens; start += kCosineColumns) {
    const S *__restrict__ right = packed + start * width;
    std::fill(&products[0][0], &products[0][0] + kCosineRows * kCosineColumns, S(0));
    for (int64_t depth = 0; depth < width; depth += kDepth)
      for (int64_t row = first; row < last; row += kRows) {
        const int rows = int(std::min<int64_t>(kRows, last - row));
        S sums[kRows][kCosineColumns];
        for (int q = 0; q < kRows; ++q)
          for (int t = 0; t < kCosineColumns; ++t)
            sums[q][t] = products[row - first + q][t];
        for (int64_t d = depth; d < std::min(width, depth + kDepth); ++d)
          for (int q = 0; q < kRows; ++q) {
            const S left = unit[(row + (q < rows ? q : 0)) * width + d];
#pragma GCC ivdep
            for (int t = 0; t < kCosineColumns; ++t)
              sums[q][t] += left * right[d * kCosineColumns + t];
          }
        for (int q = 0; q < kRows; ++q)
          for (int t = 0; t < kCosineColumns; ++t)
            products[row - first + q][t] = sums[q][t];
      }
    const int64_t end = std::min(tokens, start + kCosineColumns);
    for (int64_t i = first; i < last; ++i) {
      const S *__restrict__ cosine = products[i - first];
      if (matrix)
        for (int64_t j = std::max(i, start); j < end; ++j)
          matrix[i * tokens + j] = matrix[j * tokens + i] = i == j ? itself(cosine[j - start]) : cosine[j - start];
      else if (method == Diversity::kMaxMin) {
        for (int64_t j = start; j < end; ++j)
          nearest[i] = j != i && cosine[j - start] > nearest[i] ? cosine[j - start] : nearest[i];
      } else
        for (int64_t j = start; j < end; ++j)
          gain[i] += fixed(i == j ? itself(cosine[j - start]) : cosine[j - start]);
    }
  }
}

template <typename S>
FASTMLLM_INLINE void row_of(const S *__restrict__ unit, int64_t j, int64_t tokens, int64_t width, S *__restrict__ row) {
  constexpr int kLanes = 32;
  const S *__restrict__ right = unit + j * width;
  for (int64_t i = 0; i < tokens; ++i) {
    const S *__restrict__ left = unit + i * width;
    S sums[kLanes] = {};
    S sum = 0;
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes)
#pragma GCC ivdep
      for (int q = 0; q < kLanes; ++q)
        sums[q] += left[d + q] * right[d + q];
    for (; d < width; ++d)
      sum += left[d] * right[d];
    for (int q = 0; q < kLanes; ++q)
      sum += sums[q];
    row[i] = i == j ? itself(sum) : sum;
  }
}

template <typename S>
FASTMLLM_INLINE void pick(const S *__restrict__ unit, const S *__restrict__ matrix, const S *__restrict__ norm,
                          const S *__restrict__ relevance, S *__restrict__ nearest, int64_t *__restrict__ gain,
                          int64_t tokens, int64_t width, int64_t kept, Diversity method, int64_t *picked) {
  const bool cholesky = method == Diversity::kDpp || method == Diversity::kResidual;
  const bool coverage = method == Diversity::kCoverage;
  std::vector<S> buffer(matrix ? 0 : tokens), weight(tokens, S(1)), state(tokens);
  const std::unique_ptr<S[]> factor(new S[cholesky ? kept * tokens : 0]());
  std::vector<int32_t> cover(coverage ? tokens : 0), before(coverage ? tokens : 0);
  std::vector<int64_t> better;
  const auto cosines = [&](int64_t j) {
    if (matrix)
      return matrix + j * tokens;
    row_of(unit, j, tokens, width, buffer.data());
    return const_cast<const S *>(buffer.data());
  };
  for (int64_t i = 0; i < tokens; ++i) {
    if (relevance)
      weight[i] = method == Diversity::kDpp ? relevance[i] * relevance[i] : relevance[i];
    if (method == Diversity::kResidual)
      weight[i] *= norm[i] * norm[i];
    if (cholesky)
      state[i] = norm[i] > 0 ? S(1) : S(0);
    else if (method == Diversity::kMaxMin) {
      for (int64_t j = 0; matrix && j < tokens; ++j)
        nearest[i] = j != i && matrix[i * tokens + j] > nearest[i] ? matrix[i * tokens + j] : nearest[i];
      state[i] = S(1) - nearest[i];
    } else
      for (int64_t j = 0; matrix && j < tokens; ++j)
        gain[i] += fixed(matrix[i * tokens + j]);
  }
  std::vector<char> taken(tokens, 0);
  for (int64_t step = 0; step < kept; ++step) {
    int64_t leader = 0;
    S best = -std::numeric_limits<S>::infinity();
    for (int64_t i = 0; i < tokens; ++i) {
      S score = coverage ? S(gain[i]) : state[i] > (cholesky ? S(kSpanned) : S(kSame)) ? state[i] : S(0);
      score *= weight[i];
      score = score != score || norm[i] != norm[i] || state[i] != state[i] ? S(kWorst) : score;
      if (!taken[i] && score > best) {
        best = score;
        leader = i;
      }
    }
    picked[step] = leader;
    taken[leader] = 1;
    if (step + 1 == kept)
      break;
    const S *__restrict__ row = cosines(leader);
    if (method == Diversity::kMaxMin) {
      for (int64_t i = 0; i < tokens; ++i)
        state[i] = step == 0 ? S(1) - row[i] : std::min(state[i], S(1) - row[i]);
    } else if (cholesky) {
      S *__restrict__ next = factor.get() + step * tokens;
      if (!(state[leader] > S(kSpanned)))
        continue; // a row of zeros
      std::copy(row, row + tokens, next);
      for (int64_t c = 0; c < step; ++c) {
        const S *__restrict__ earlier = factor.get() + c * tokens;
        const S share = earlier[leader];
#pragma GCC ivdep
        for (int64_t i = 0; i < tokens; ++i)
          next[i] -= share * earlier[i];
      }
      const S inverse = S(1) / std::sqrt(state[leader]);
      for (int64_t i = 0; i < tokens; ++i) {
        next[i] *= inverse;
        state[i] -= next[i] * next[i];
      }
    } else {
      better.clear();
      for (int64_t i = 0; i < tokens; ++i)
        if (fixed(row[i]) > cover[i]) {
          before[i] = cover[i];
          cover[i] = fixed(row[i]);
          better.push_back(i);
        }
      for (const int64_t i : better) { // their share of every gain falls
        const S *__restrict__ seen = cosines(i);
        const int32_t old = before[i], now = cover[i];
#pragma GCC ivdep
        for (int64_t j = 0; j < tokens; ++j)
          gain[j] += std::max(fixed(seen[j]) - now, 0) - std::max(fixed(seen[j]) - old, 0);
      }
    }
  }
}

} // namespace

FASTMLLM_CLONES float unit_row(const float *row, float *unit, int64_t width) {
  return unit_of(row, unit, width);
}
FASTMLLM_CLONES float unit_row(const bfloat16 *row, float *unit, int64_t width) {
  return unit_of(row, unit, width);
}
FASTMLLM_CLONES double unit_row(const double *row, double *unit, int64_t width) {
  return unit_of(row, unit, width);
}

FASTMLLM_CLONES void pack_units(const float *unit, float *packed, int64_t tile, int64_t tokens, int64_t width) {
  pack_tile(unit, packed, tile, tokens, width);
}
FASTMLLM_CLONES void pack_units(const double *unit, double *packed, int64_t tile, int64_t tokens, int64_t width) {
  pack_tile(unit, packed, tile, tokens, width);
}

FASTMLLM_CLONES void cosine_rows(const float *unit, const float *packed, int64_t first, int64_t last, int64_t tokens,
                                 int64_t width, Diversity method, float *matrix, float *nearest, int64_t *gain) {
  rows_of(unit, packed, first, last, tokens, width, method, matrix, nearest, gain);
}
FASTMLLM_CLONES void cosine_rows(const double *unit, const double *packed, int64_t first, int64_t last, int64_t tokens,
                                 int64_t width, Diversity method, double *matrix, double *nearest, int64_t *gain) {
  rows_of(unit, packed, first, last, tokens, width, method, matrix, nearest, gain);
}

FASTMLLM_CLONES void pick_diverse(const float *unit, const float *matrix, const float *norm, const float *weight,
                                  float *nearest, int64_t *gain, int64_t tokens, int64_t width, int64_t kept,
                                  Diversity method, int64_t *picked) {
  pick(unit, matrix, norm, weight, nearest, gain, tokens, width, kept, method, picked);
}
FASTMLLM_CLONES void pick_diverse(const double *unit, const double *matrix, const double *norm, const double *weight,
                                  double *nearest, int64_t *gain, int64_t tokens, int64_t width, int64_t kept,
                                  Diversity method, int64_t *picked) {
  pick(unit, matrix, norm, weight, nearest, gain, tokens, width, kept, method, picked);
}

} // namespace fastmllm
