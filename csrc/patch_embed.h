// Loops of patch_embed. They walk patches [first, last) of one image, row-major. An image row has `row_length` values;
// a patch is `patch` runs of `run` = patch * channels consecutive values; `scale` and `shift` hold `run` values each.
#pragma once
#include "simd.h"

namespace fastmllm {

// rows = image * scale + shift, patch by patch.
#define FASTMLLM_PACK(From, To, Sum)                                                                                   \
  void pack_patches(const From *image, To *rows, const Sum *scale, const Sum *shift, int64_t first, int64_t last,      \
                    int64_t row_length, int64_t patch, int64_t run)
FASTMLLM_PACK(uint8_t, float, float);
FASTMLLM_PACK(uint8_t, bfloat16, float);
FASTMLLM_PACK(uint8_t, double, double);
FASTMLLM_PACK(float, float, float);
FASTMLLM_PACK(float, bfloat16, float);
FASTMLLM_PACK(double, double, double);

// image = rows * scale: the gradient of the above.
#define FASTMLLM_UNPACK(T)                                                                                             \
  void unpack_patches(const T *rows, T *image, const T *scale, int64_t first, int64_t last, int64_t row_length,        \
                      int64_t patch, int64_t run)
FASTMLLM_UNPACK(float);
FASTMLLM_UNPACK(double);

// out[n] = bias + position[n] for n in [first, last); either may be null. Summed in the type of the bias.
#define FASTMLLM_ADD_OFFSETS(T, Sum)                                                                                   \
  void add_offsets(const Sum *bias, const T *position, T *out, int64_t first, int64_t last, int64_t width)
FASTMLLM_ADD_OFFSETS(float, float);
FASTMLLM_ADD_OFFSETS(double, double);
FASTMLLM_ADD_OFFSETS(bfloat16, float);

// out[n] += position[n] for n in [first, last).
void add_positions(const float *position, float *out, int64_t first, int64_t last, int64_t width);

} // namespace fastmllm
