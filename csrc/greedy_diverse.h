// Loops of greedy_diverse: unit vectors, their cosines, and the greedy choice in one segment.
#pragma once
#include "simd.h"

namespace fastmllm {

enum class Diversity { kMaxMin, kDpp, kCoverage, kResidual };

constexpr int64_t kCosineColumns = 64; // tokens in a tile of the packed matrix
constexpr int64_t kCosineRows = 48;    // tokens a task

// unit[i] = row[i] / max(|row|, 1e-12); returns |row|. An infinite one is NaN, as if the row had a NaN.
float unit_row(const float *row, float *unit, int64_t width);
float unit_row(const bfloat16 *row, float *unit, int64_t width);
double unit_row(const double *row, double *unit, int64_t width);

// packed (tiles, width, kCosineColumns): tokens in columns, zeros behind the last one.
void pack_units(const float *unit, float *packed, int64_t tile, int64_t tokens, int64_t width);
void pack_units(const double *unit, double *packed, int64_t tile, int64_t tokens, int64_t width);

// The cosines of tokens [first, last) with all: with a matrix (tokens, tokens) both triangles are filled from the upper
// one; without, part[i] = the largest with another token (kMaxMin) or the sum of positive ones, fixed point
// (kCoverage).
void cosine_rows(const float *unit, const float *packed, int64_t first, int64_t last, int64_t tokens, int64_t width,
                 Diversity method, float *matrix, float *nearest, int64_t *gain);
void cosine_rows(const double *unit, const double *packed, int64_t first, int64_t last, int64_t tokens, int64_t width,
                 Diversity method, double *matrix, double *nearest, int64_t *gain);

// picked[step] for `kept` steps. matrix may be null: then rows of cosines are computed when they are needed, and
// nearest or gain were filled by cosine_rows. weight is null or one value a token; norm is |x|.
void pick_diverse(const float *unit, const float *matrix, const float *norm, const float *weight, float *nearest,
                  int64_t *gain, int64_t tokens, int64_t width, int64_t kept, Diversity method, int64_t *picked);
void pick_diverse(const double *unit, const double *matrix, const double *norm, const double *weight, double *nearest,
                  int64_t *gain, int64_t tokens, int64_t width, int64_t kept, Diversity method, int64_t *picked);

} // namespace fastmllm
