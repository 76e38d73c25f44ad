// Loops of vision_rope: turn the heads of packed tokens by their positions.
#pragma once
#include "simd.h"

namespace fastmllm {

// Where the heads of a token stand: pointers to the first token, and how far apart tokens are.
template <typename T> struct Heads {
  const T *source;
  T *target;
  int64_t source_stride, target_stride, heads;
};

// Turn tokens [first, last): entries i and i + half of a head together (or 2i and 2i + 1, if interleaved); the other
// entries are copied. cos and sin are (tokens, half); sign -1 turns back.
void turn(const Heads<float> &x, const float *cos, const float *sin, int64_t first, int64_t last, int64_t head_dim,
          int64_t half, float sign, bool interleaved);
void turn(const Heads<bfloat16> &x, const float *cos, const float *sin, int64_t first, int64_t last, int64_t head_dim,
          int64_t half, float sign, bool interleaved);
void turn(const Heads<double> &x, const double *cos, const double *sin, int64_t first, int64_t last, int64_t head_dim,
          int64_t half, double sign, bool interleaved);

} // namespace fastmllm
