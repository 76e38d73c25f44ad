// A segment tree over the free space of the bins finds the first bin that fits in O(log n).
#include "planner.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace fastmllm {

std::vector<std::vector<int64_t>> pack_first_fit(const std::vector<int64_t> &lengths, int64_t capacity) {
  for (size_t i = 0; i < lengths.size(); ++i)
    if (lengths[i] < 0 || lengths[i] > capacity)
      throw std::invalid_argument("fastmllm::pack_first_fit: item " + std::to_string(i) + " has length " +
                                  std::to_string(lengths[i]) + ", but a bin holds 0 to " + std::to_string(capacity) +
                                  ": truncate or drop it, or raise the capacity");
  std::vector<int64_t> order(lengths.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });

  size_t leaves = 1;
  while (leaves < lengths.size())
    leaves *= 2;
  std::vector<int64_t> free_space(2 * leaves, capacity); // leaf i is bin i, a parent the most of its children
  std::vector<std::vector<int64_t>> bins;
  for (const int64_t item : order) {
    size_t node = 1;
    while (node < leaves)
      node = free_space[2 * node] >= lengths[item] ? 2 * node : 2 * node + 1;
    const size_t bin = node - leaves;
    if (bin == bins.size())
      bins.emplace_back();
    bins[bin].push_back(item);
    free_space[node] -= lengths[item];
    for (node /= 2; node >= 1; node /= 2)
      free_space[node] = std::max(free_space[2 * node], free_space[2 * node + 1]);
  }
  for (auto &bin : bins)
    std::sort(bin.begin(), bin.end());
  return bins;
}

} // namespace fastmllm
