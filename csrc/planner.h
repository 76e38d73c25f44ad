// Host-side planners, without Python or torch.
#pragma once
#include <cstdint>
#include <vector>

namespace fastmllm {

// First-fit decreasing in O(n log n). Throws std::invalid_argument naming an item that fits into no bin.
std::vector<std::vector<int64_t>> pack_first_fit(const std::vector<int64_t> &lengths, int64_t capacity);

} // namespace fastmllm
