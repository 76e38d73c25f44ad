// The loop of splice_tokens: rows of two matrices, moved in stretches.
#pragma once
#include <cstdint>

namespace fastmllm {

// For i in [begin, end): out[i] = cat(a, b)[rows[i]], zeros for row -1; a has a_rows rows of `bytes` bytes, both have
// all_rows. Returns the first i whose row is outside of [-1, all_rows), or -1.
int64_t gather_rows(const char *a, int64_t a_rows, const char *b, int64_t all_rows, const int64_t *rows, int64_t begin,
                    int64_t end, int64_t bytes, char *out);

} // namespace fastmllm
