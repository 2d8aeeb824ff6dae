// The CPU kernel of a norm: one chunk at a time, as csrc/math/norm.h has it. Compiled
// like kernel.cpp.
#include "cpu/blocks.h"

namespace mlx_fused_optim::cpu {
namespace {

using fused_math::kChunk;
using fused_math::kLanes;

static_assert(kLanes % kWidth == 0);

/// What is squared of `n` elements, with zeros behind them, up to whole rows of lanes:
/// multiplied by the factor of their peak. Returns the peak before clipping by value.
uint32_t prepare(
    const Source& source,
    size_t begin,
    size_t n,
    fused_math::StepHyper hyper,
    uint32_t flags,
    float* values) {
  float buffer[kChunk];
  const float* from = read(source, begin, n, buffer);
  uint32_t peak = 0;
  for (size_t i = 0; i < n; ++i) {
    peak = fused_math::peak_of(peak, fused_math::step_unscaled(from[i], hyper, flags));
  }
  for (size_t i = 0; i < n; ++i) {
    values[i] =
        fused_math::step_clipped(fused_math::step_unscaled(from[i], hyper, flags), hyper, flags);
  }
  const float factor = fused_math::factor_of(fused_math::step_clipped_peak(peak, hyper, flags));
  for (size_t i = 0; factor != 1.0f && i < n; ++i) {
    values[i] = values[i] * factor;
  }
  for (size_t i = n; i < (n + kLanes - 1) / kLanes * kLanes; ++i) {
    values[i] = 0.0f;
  }
  return peak;
}

} // namespace

fused_math::Squares KERNEL(measure)(
    const Source& source,
    size_t begin,
    size_t n,
    fused_math::StepHyper hyper,
    uint32_t flags) {
  alignas(64) float values[kChunk];
  alignas(64) float lanes[kLanes] = {};
  const uint32_t peak = prepare(source, begin, n, hyper, flags, values);
  for (size_t lane = 0; lane < kLanes; lane += kWidth) {
    Vector sum{};
    for (size_t i = lane; i < n; i += kLanes) { // the last row is padded
      Vector x;
      memcpy(&x, values + i, sizeof(x));
      sum = sum + x * x;
    }
    memcpy(lanes + lane, &sum, sizeof(sum));
  }
  for (size_t half = kLanes / 2; half > 0; half /= 2) {
    for (size_t lane = 0; lane < half; ++lane) {
      lanes[lane] = lanes[lane] + lanes[lane + half];
    }
  }
  return {
      {lanes[0], 0.0f},
      fused_math::scale_of(fused_math::step_clipped_peak(peak, hyper, flags)),
      peak};
}

} // namespace mlx_fused_optim::cpu
