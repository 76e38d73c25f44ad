// Torch-free loops of patch_embed (see kernels/patch_embed.py for the maths).
#include "patch_embed.h"

namespace fastmllm {
namespace {

template <typename T>
FASTMLLM_INLINE void pack(const uint8_t *__restrict__ image, T *__restrict__ rows, int64_t first, int64_t last,
                          int64_t row_length, int64_t patch, int64_t run) {
  const int64_t grid = row_length / run;
  for (int64_t p = first; p < last; ++p) {
    const uint8_t *source = image + (p / grid) * patch * row_length + (p % grid) * run;
    for (int64_t i = 0; i < patch; ++i, source += row_length, rows += run)
#pragma GCC ivdep
      for (int64_t t = 0; t < run; ++t)
        narrow(float(int(source[t]) - 128) * (1.0f / 128), rows[t]); // exact
  }
}

template <typename S, typename T>
FASTMLLM_INLINE void offsets(const S *__restrict__ bias, const T *__restrict__ position, T *__restrict__ out,
                             int64_t first, int64_t last, int64_t width) {
  for (int64_t n = first; n < last; ++n) {
    T *__restrict__ row = out + n * width;
    const T *__restrict__ added = position ? position + n * width : nullptr;
    if (bias && added)
#pragma GCC ivdep
      for (int64_t d = 0; d < width; ++d)
        narrow(bias[d] + widen(added[d]), row[d]);
    else if (bias)
#pragma GCC ivdep
      for (int64_t d = 0; d < width; ++d)
        narrow(bias[d], row[d]);
    else
      std::memcpy(row, added, width * sizeof(T));
  }
}

} // namespace

FASTMLLM_CLONES void pack_patches(const uint8_t *image, float *rows, int64_t first, int64_t last, int64_t row_length,
                                  int64_t patch, int64_t run) {
  pack(image, rows, first, last, row_length, patch, run);
}
FASTMLLM_CLONES void pack_patches(const uint8_t *image, double *rows, int64_t first, int64_t last, int64_t row_length,
                                  int64_t patch, int64_t run) {
  pack(image, rows, first, last, row_length, patch, run);
}
FASTMLLM_CLONES void pack_patches(const uint8_t *image, bfloat16 *rows, int64_t first, int64_t last, int64_t row_length,
                                  int64_t patch, int64_t run) {
  pack(image, rows, first, last, row_length, patch, run);
}

void copy_patches(const char *image, char *rows, int64_t first, int64_t last, int64_t row_length, int64_t patch,
                  int64_t run) {
  const int64_t grid = row_length / run;
  for (int64_t p = first; p < last; ++p) {
    const char *source = image + (p / grid) * patch * row_length + (p % grid) * run;
    for (int64_t i = 0; i < patch; ++i, source += row_length, rows += run)
      std::memcpy(rows, source, run);
  }
}

FASTMLLM_CLONES void add_offsets(const float *bias, const float *position, float *out, int64_t first, int64_t last,
                                 int64_t width) {
  offsets(bias, position, out, first, last, width);
}
FASTMLLM_CLONES void add_offsets(const double *bias, const double *position, double *out, int64_t first, int64_t last,
                                 int64_t width) {
  offsets(bias, position, out, first, last, width);
}
FASTMLLM_CLONES void add_offsets(const float *bias, const bfloat16 *position, bfloat16 *out, int64_t first,
                                 int64_t last, int64_t width) {
  offsets(bias, position, out, first, last, width);
}

FASTMLLM_CLONES void add_positions(const float *__restrict__ position, float *__restrict__ out, int64_t first,
                                   int64_t last, int64_t width) {
#pragma GCC ivdep
  for (int64_t i = first * width; i < last * width; ++i)
    out[i] += position[i];
}

} // namespace fastmllm
