// What the kernels come in: compiled for just what a step consists of. No CUDA and no MLX
// here: tested without a GPU.
#pragma once

#include <compare>
#include <string>

#include "cuda/launch.h"

namespace mlx_fused_optim::cuda {

enum class Kind : uint32_t {
  tiled,
  turned,
  strided,
  measure_dense,
  measure_sparse,
  measure_fold,
  measure_finish,
  schedule,
};

/// What schedules consist of, as csrc/math/schedule.h has it.
struct ScheduleParts {
  uint32_t kinds = 0;
  uint32_t flags = 0;
  auto operator<=>(const ScheduleParts&) const = default;
};
ScheduleParts parts_of(const fused_math::Schedule& schedule);

/// Of all schedules that a step evaluates.
ScheduleParts parts_of(const fused_math::StepControl& control);

/// A kernel, and what it knows when it is compiled. What a kind has no use for is left out.
struct Variant {
  Kind kind;
  uint32_t rule = 0;
  Type parameter = Type::float32;
  Type state = Type::float32; // of the rule's slots
  uint32_t gradients = bit_of(Type::float32); // a set of types
  uint32_t flags = 0; // fused_math::StepFlags
  ScheduleParts schedules = {};
  uint32_t capacity = 0; // see capacity_for
  auto operator<=>(const Variant&) const = default;

  /// The same kernel, for all schedules, gradients and options.
  Variant generic() const;

  /// The name of its entry point.
  const char* name() const;
  std::string description() const;
  /// The whole text to be compiled.
  std::string text() const;
};

} // namespace mlx_fused_optim::cuda
