#include "splice_tokens.h"

#include <cstring>

namespace fastmllm {

int64_t gather_rows(const char *a, int64_t a_rows, const char *b, int64_t all_rows, const int64_t *rows, int64_t begin,
                    int64_t end, int64_t bytes, char *out) {
  for (int64_t i = begin; i < end;) {
    const int64_t row = rows[i];
    if (row < -1 || row >= all_rows)
      return i;
    const int64_t border = row < a_rows ? a_rows : all_rows; // text and images come in stretches: one copy for each
    int64_t next = i + 1;
    if (row < 0) {
      std::memset(out + i * bytes, 0, bytes);
    } else {
      while (next < end && rows[next] == row + next - i && rows[next] < border)
        ++next;
      std::memcpy(out + i * bytes, row < a_rows ? a + row * bytes : b + (row - a_rows) * bytes, (next - i) * bytes);
    }
    i = next;
  }
  return -1;
}

} // namespace fastmllm
