// Loops of token_select: the k best of a segment without sorting it, and where each token goes.
#pragma once
#include "simd.h"

namespace fastmllm {

// place[i] for i in [0, tokens): `first_row` + its rank among the kept in the segment's order, or -1; index[row] = the
// token. The `kept` best scores stay, the earlier of equals first; NaN is below -inf. scratch has `tokens` values.
void select_segment(const float *scores, int64_t tokens, int64_t kept, int64_t first_token, int64_t first_row,
                    uint64_t *scratch, int64_t *index, int32_t *place);

// rows[r] = x[index[r]] for r in [begin, end), zeros where index is -1; a row is `bytes` long.
void gather_rows(const char *x, const int64_t *index, int64_t begin, int64_t end, int64_t bytes, char *rows);
void gather_rows(const char *x, const int32_t *index, int64_t begin, int64_t end, int64_t bytes, char *rows);

} // namespace fastmllm
