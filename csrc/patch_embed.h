// Loops of patch_embed. Patches [first, last) of one image (height, row_length = width * channels), row-major.
#pragma once
#include "simd.h"

namespace fastmllm {

// uint8 values as (v - 128) / 128; a patch is `patch` runs of `run` = patch * channels consecutive values.
void pack_patches(const uint8_t *image, float *rows, int64_t first, int64_t last, int64_t row_length, int64_t patch,
                  int64_t run);
void pack_patches(const uint8_t *image, double *rows, int64_t first, int64_t last, int64_t row_length, int64_t patch,
                  int64_t run);
void pack_patches(const uint8_t *image, bfloat16 *rows, int64_t first, int64_t last, int64_t row_length, int64_t patch,
                  int64_t run);

// The same for values that need no conversion; lengths are bytes.
void copy_patches(const char *image, char *rows, int64_t first, int64_t last, int64_t row_length, int64_t patch,
                  int64_t run);

// out[n] = bias + position[n] for n in [first, last); either may be null. Summed in the type of the bias.
void add_offsets(const float *bias, const float *position, float *out, int64_t first, int64_t last, int64_t width);
void add_offsets(const double *bias, const double *position, double *out, int64_t first, int64_t last, int64_t width);
void add_offsets(const float *bias, const bfloat16 *position, bfloat16 *out, int64_t first, int64_t last,
                 int64_t width);

// out[n] += position[n] for n in [first, last).
void add_positions(const float *position, float *out, int64_t first, int64_t last, int64_t width);

} // namespace fastmllm
