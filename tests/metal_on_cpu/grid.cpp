#include "grid.h"

#include <algorithm>
#include <numeric>
#include <random>

namespace metal_on_cpu {

namespace {

std::vector<uint32_t> arranged(size_t count, Order order) {
  std::vector<uint32_t> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  if (order == Order::reverse) {
    std::reverse(numbers.begin(), numbers.end());
  } else if (order == Order::shuffled) {
    std::shuffle(numbers.begin(), numbers.end(), std::minstd_rand(count));
  }
  return numbers;
}

} // namespace

void run_grid(
    const Kernel& kernel,
    Buffers& buffers,
    size_t threads,
    size_t group_size,
    Order order,
    void (*before)(uint32_t thread)) {
  for (uint32_t group : arranged((threads + group_size - 1) / group_size, order)) {
    const size_t first = group * group_size;
    const size_t size = std::min(group_size, threads - first);
    for (uint32_t lane : arranged(size, order)) {
      const auto position = uint32_t(first + lane);
      before(position);
      kernel.call(
          kernel.arguments.data(),
          buffers,
          {position, lane, group, uint32_t(threads), uint32_t(size)});
    }
  }
}

} // namespace metal_on_cpu
