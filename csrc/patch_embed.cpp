// Torch-free loops of patch_embed (see kernels/patch_embed.py for the maths).
#include "patch_embed.h"

namespace fastmllm {
namespace {

template <typename From, typename To, typename Sum>
FASTMLLM_INLINE void pack(const From *__restrict__ image, To *__restrict__ rows, const Sum *__restrict__ scale,
                          const Sum *__restrict__ shift, int64_t first, int64_t last, int64_t row_length, int64_t patch,
                          int64_t run) {
  const int64_t grid = row_length / run;
  for (int64_t p = first; p < last; ++p) {
    const From *source = image + (p / grid) * patch * row_length + (p % grid) * run;
    for (int64_t i = 0; i < patch; ++i, source += row_length, rows += run)
#pragma GCC ivdep
      for (int64_t t = 0; t < run; ++t)
        narrow(Sum(widen(source[t])) * scale[t] + shift[t], rows[t]);
  }
}

template <typename T>
FASTMLLM_INLINE void unpack(const T *__restrict__ rows, T *__restrict__ image, const T *__restrict__ scale,
                            int64_t first, int64_t last, int64_t row_length, int64_t patch, int64_t run) {
  const int64_t grid = row_length / run;
  for (int64_t p = first; p < last; ++p) {
    T *target = image + (p / grid) * patch * row_length + (p % grid) * run;
    for (int64_t i = 0; i < patch; ++i, target += row_length, rows += run)
#pragma GCC ivdep
      for (int64_t t = 0; t < run; ++t)
        target[t] = rows[t] * scale[t];
  }
}

template <typename From, typename To, typename Sum>
FASTMLLM_INLINE void pack_channels(const From *__restrict__ image, To *__restrict__ row, const Sum *__restrict__ scale,
                                   const Sum *__restrict__ shift, int64_t plane, int64_t row_length, int64_t patch,
                                   int64_t channels) {
  if (channels == 3) { // a constant lets the compiler interleave in registers
    const From *green = image + plane, *blue = green + plane;
    for (int64_t i = 0; i < patch; ++i, image += row_length, green += row_length, blue += row_length, row += patch * 3)
#pragma GCC ivdep
      for (int64_t t = 0; t < patch; ++t) {
        narrow(Sum(widen(image[t])) * scale[0] + shift[0], row[3 * t]);
        narrow(Sum(widen(green[t])) * scale[1] + shift[1], row[3 * t + 1]);
        narrow(Sum(widen(blue[t])) * scale[2] + shift[2], row[3 * t + 2]);
      }
    return;
  }
  for (int64_t i = 0; i < patch; ++i, image += row_length, row += patch * channels)
    for (int64_t c = 0; c < channels; ++c)
#pragma GCC ivdep
      for (int64_t t = 0; t < patch; ++t)
        narrow(Sum(widen(image[c * plane + t])) * scale[c] + shift[c], row[t * channels + c]);
}

template <typename T>
FASTMLLM_INLINE void unpack_channels(const T *__restrict__ row, T *__restrict__ image, const T *__restrict__ scale,
                                     int64_t plane, int64_t row_length, int64_t patch, int64_t channels) {
  for (int64_t i = 0; i < patch; ++i, image += row_length, row += patch * channels)
    for (int64_t c = 0; c < channels; ++c)
#pragma GCC ivdep
      for (int64_t t = 0; t < patch; ++t)
        image[c * plane + t] = row[t * channels + c] * scale[c];
}

template <typename T, typename Sum>
FASTMLLM_INLINE void offsets(const Sum *__restrict__ bias, const T *__restrict__ position, T *__restrict__ out,
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

#define PACK(From, To, Sum)                                                                                            \
  FASTMLLM_CLONES FASTMLLM_PACK(From, To, Sum) {                                                                       \
    pack(image, rows, scale, shift, first, last, row_length, patch, run);                                              \
  }
PACK(uint8_t, float, float)
PACK(uint8_t, bfloat16, float)
PACK(uint8_t, double, double)
PACK(float, float, float)
PACK(float, bfloat16, float)
PACK(double, double, double)

#define PACK_PLANAR(From, To, Sum)                                                                                     \
  FASTMLLM_CLONES FASTMLLM_PACK_PLANAR(From, To, Sum) {                                                                \
    pack_channels(image, row, scale, shift, plane, row_length, patch, channels);                                       \
  }
PACK_PLANAR(uint8_t, float, float)
PACK_PLANAR(uint8_t, bfloat16, float)
PACK_PLANAR(uint8_t, double, double)
PACK_PLANAR(float, float, float)
PACK_PLANAR(float, bfloat16, float)
PACK_PLANAR(double, double, double)

#define UNPACK(T)                                                                                                      \
  FASTMLLM_CLONES FASTMLLM_UNPACK(T) {                                                                                 \
    unpack(rows, image, scale, first, last, row_length, patch, run);                                                   \
  }
UNPACK(float)
UNPACK(double)

#define UNPACK_PLANAR(T)                                                                                               \
  FASTMLLM_CLONES FASTMLLM_UNPACK_PLANAR(T) {                                                                          \
    unpack_channels(row, image, scale, plane, row_length, patch, channels);                                            \
  }
UNPACK_PLANAR(float)
UNPACK_PLANAR(double)

#define ADD_OFFSETS(T, Sum)                                                                                            \
  FASTMLLM_CLONES FASTMLLM_ADD_OFFSETS(T, Sum) {                                                                       \
    offsets(bias, position, out, first, last, width);                                                                  \
  }
ADD_OFFSETS(float, float)
ADD_OFFSETS(double, double)
ADD_OFFSETS(bfloat16, float)

FASTMLLM_CLONES void add_positions(const float *__restrict__ position, float *__restrict__ out, int64_t first,
                                   int64_t last, int64_t width) {
#pragma GCC ivdep
  for (int64_t i = first * width; i < last * width; ++i)
    out[i] += position[i];
}

} // namespace fastmllm
