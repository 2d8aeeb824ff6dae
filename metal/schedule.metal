#include "math/schedule.h"

using namespace fused_math;

/// A schedule at many steps.
[[kernel]] void schedule_values(
    constant Schedule& schedule [[buffer(0)]],
    device const uint64_t* steps [[buffer(1)]],
    device float* values [[buffer(2)]],
    constant uint64_t& size [[buffer(3)]],
    uint32_t position [[thread_position_in_grid]],
    uint32_t positions [[threads_per_grid]]) {
  for (uint64_t i = position; i < size; i += positions) {
    values[i] = schedule_value(schedule, steps[i]);
  }
}
