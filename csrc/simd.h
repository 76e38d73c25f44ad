// What every loop shares: one binary for every x86-64 level, and bf16 as its 16 bits.
#pragma once
#include <cstdint>
#include <cstring>

// Plain -O3 is SSE2. The attribute goes on the function that holds the loop: the loader picks a clone for the machine.
#if !defined(FASTMLLM_ONE_LEVEL) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) &&                 \
    defined(__linux__)
#define FASTMLLM_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FASTMLLM_CLONES
#endif
#define FASTMLLM_INLINE static inline __attribute__((always_inline))

namespace fastmllm {

struct bfloat16 {
  uint16_t bits;
};

FASTMLLM_INLINE float widen(uint8_t x) {
  return float(x);
}
FASTMLLM_INLINE float widen(float x) {
  return x;
}
FASTMLLM_INLINE double widen(double x) {
  return x;
}
FASTMLLM_INLINE float widen(bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

FASTMLLM_INLINE void narrow(float x, float &out) {
  out = x;
}
FASTMLLM_INLINE void narrow(double x, double &out) {
  out = x;
}
FASTMLLM_INLINE void narrow(float x, bfloat16 &out) { // to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

} // namespace fastmllm
