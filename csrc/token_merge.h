// Loops of token_merge: bipartite matching without the N x N similarity, and the size-weighted merge.
#pragma once
#include "simd.h"

namespace fastmllm {

constexpr int64_t kMatchColumns = 64; // odd tokens in a tile; the packed matrix is padded to a multiple with zeros

// unit[i] = row[i] / max(|row|, 1e-12), written with a stride (1 for even tokens, the packed width for odd ones).
void normalise(const float *row, float *unit, int64_t width, int64_t stride);
void normalise(const bfloat16 *row, float *unit, int64_t width, int64_t stride);
void normalise(const double *row, double *unit, int64_t width, int64_t stride);

// For even tokens [first, last) of a (rows, width): the largest product with a column of b (width, padded), and which;
// NaN counts as -2.
void match(const float *a, const float *b, int64_t first, int64_t last, int64_t width, int64_t columns, int64_t padded,
           float *best, int64_t *index);
void match(const double *a, const double *b, int64_t first, int64_t last, int64_t width, int64_t columns,
           int64_t padded, double *best, int64_t *index);

// destination[n] for n in [0, tokens): the r best pairs merge, the earlier of equals first; order is kept. The first
// `fixed` even tokens do not merge; index counts odd tokens from `skip`; the first row of the segment's output is
// `row`.
void plan(const float *best, const int64_t *index, int64_t tokens, int64_t r, int64_t fixed, int64_t skip, int64_t row,
          int64_t *destination);
void plan(const double *best, const int64_t *index, int64_t tokens, int64_t r, int64_t fixed, int64_t skip, int64_t row,
          int64_t *destination);

// out[k] = sum(size * x) / sum(size) over the tokens of a segment that went to k, counted from `row`, and the logarithm
// of that sum of sizes; sums is zeroed scratch of (kept, width).
void merge(const float *x, const float *size, const int64_t *destination, int64_t row, float *out, float *new_size,
           float *log_size, float *sums, int64_t tokens, int64_t kept, int64_t width);
void merge(const bfloat16 *x, const float *size, const int64_t *destination, int64_t row, bfloat16 *out,
           float *new_size, float *log_size, float *sums, int64_t tokens, int64_t kept, int64_t width);
void merge(const double *x, const double *size, const int64_t *destination, int64_t row, double *out, double *new_size,
           double *log_size, double *sums, int64_t tokens, int64_t kept, int64_t width);

} // namespace fastmllm
