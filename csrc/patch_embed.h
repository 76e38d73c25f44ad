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

// One patch of an image that holds a plane for each of its `channels`: `image` points to the patch's first value,
// `row_length` values on is its next row, `plane` values on the next channel. `scale` and `shift` hold `channels`
// values.
#define FASTMLLM_PACK_PLANAR(From, To, Sum)                                                                            \
  void pack_planar(const From *image, To *row, const Sum *scale, const Sum *shift, int64_t plane, int64_t row_length,  \
                   int64_t patch, int64_t channels)
FASTMLLM_PACK_PLANAR(uint8_t, float, float);
FASTMLLM_PACK_PLANAR(uint8_t, bfloat16, float);
FASTMLLM_PACK_PLANAR(uint8_t, double, double);
FASTMLLM_PACK_PLANAR(float, float, float);
FASTMLLM_PACK_PLANAR(float, bfloat16, float);
FASTMLLM_PACK_PLANAR(double, double, double);

// image = rows * scale: the gradient of the above.
#define FASTMLLM_UNPACK(T)                                                                                             \
  void unpack_patches(const T *rows, T *image, const T *scale, int64_t first, int64_t last, int64_t row_length,        \
                      int64_t patch, int64_t run)
FASTMLLM_UNPACK(float);
FASTMLLM_UNPACK(double);

#define FASTMLLM_UNPACK_PLANAR(T)                                                                                      \
  void unpack_planar(const T *row, T *image, const T *scale, int64_t plane, int64_t row_length, int64_t patch,         \
                     int64_t channels)
FASTMLLM_UNPACK_PLANAR(float);
FASTMLLM_UNPACK_PLANAR(double);

// out[n] = bias + position[n] for n in [first, last); either may be null. Summed in the type of the bias.
#define FASTMLLM_ADD_OFFSETS(T, Sum)                                                                                   \
  void add_offsets(const Sum *bias, const T *position, T *out, int64_t first, int64_t last, int64_t width)
FASTMLLM_ADD_OFFSETS(float, float);
FASTMLLM_ADD_OFFSETS(double, double);
FASTMLLM_ADD_OFFSETS(bfloat16, float);

// out[n] += position[n] for n in [first, last).
void add_positions(const float *position, float *out, int64_t first, int64_t last, int64_t width);

} // namespace fastmllm
