// Torch-free loops of token_select (see kernels/token_select.py for what it means).
#include "token_select.h"

#include <algorithm>

namespace fastmllm {
namespace {

// Unsigned keys in the opposite order of the scores: -0 equals 0, NaN is the largest.
FASTMLLM_INLINE uint32_t descending(float score) {
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  bits = bits == 0x80000000u ? 0 : bits;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return nan ? 0xffffffffu : bits >> 31 ? bits : ~bits & 0x7fffffffu;
}

template <typename I>
void gather(const char *x, const I *index, int64_t begin, int64_t end, int64_t bytes, char *rows) {
  for (int64_t r = begin; r < end;) {
    int64_t next = r + 1; // rows that follow each other, or are all empty, move at once
    if (index[r] < 0) {
      while (next < end && index[next] < 0)
        ++next;
      std::memset(rows + r * bytes, 0, size_t((next - r) * bytes));
    } else {
      while (next < end && index[next] == index[next - 1] + 1)
        ++next;
      std::memcpy(rows + r * bytes, x + int64_t(index[r]) * bytes, size_t((next - r) * bytes));
    }
    r = next;
  }
}

} // namespace

void select_segment(const float *scores, int64_t tokens, int64_t kept, int64_t first_token, int64_t first_row,
                    uint64_t *scratch, int64_t *index, int32_t *place) {
  uint64_t last = 0; // the key of the worst token that stays: keys differ, because they end with the token's number
  if (kept == tokens)
    last = ~uint64_t(0);
  else if (kept) {
    for (int64_t i = 0; i < tokens; ++i)
      scratch[i] = uint64_t(descending(scores[i])) << 32 | uint64_t(i);
    std::nth_element(scratch, scratch + kept - 1, scratch + tokens);
    last = scratch[kept - 1];
  }
  int64_t row = first_row;
  for (int64_t i = 0; i < tokens; ++i) {
    const bool stays = kept && (uint64_t(descending(scores[i])) << 32 | uint64_t(i)) <= last;
    place[i] = stays ? int32_t(row) : -1;
    if (stays)
      index[row++] = first_token + i;
  }
}

void gather_rows(const char *x, const int64_t *index, int64_t begin, int64_t end, int64_t bytes, char *rows) {
  gather(x, index, begin, end, bytes, rows);
}
void gather_rows(const char *x, const int32_t *index, int64_t begin, int64_t end, int64_t bytes, char *rows) {
  gather(x, index, begin, end, bytes, rows);
}

} // namespace fastmllm
