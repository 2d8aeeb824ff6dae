// The kernels of the full step's tiles: what each knows when it is compiled. The one list
// that the kernels, their names and the choice between them come from.
#pragma once

#include "cuda/launch.h"

namespace mlx_fused_optim::cuda {

/// The options that a variant has or has not. Each has a slot, or arithmetic, of its own
/// for every element; all others cost little and are known at run time.
constexpr uint32_t kCompiledFlags =
    fused_math::kMaster | fused_math::kCompensated | fused_math::kStochastic | fused_math::kAverage;

// VARIANT(dtype of parameters, dtype of momentum, name, which of kCompiledFlags)
#define MLX_FUSED_OPTIM_FULL_VARIANTS(VARIANT)                       \
  VARIANT(float32, float32, nearest, 0)                              \
  VARIANT(float16, float16, nearest, 0)                              \
  VARIANT(float16, float32, nearest, 0)                              \
  VARIANT(float16, float16, master, fused_math::kMaster)             \
  VARIANT(float16, float32, master, fused_math::kMaster)             \
  VARIANT(float16, float16, compensated, fused_math::kCompensated)   \
  VARIANT(float16, float16, stochastic, fused_math::kStochastic)     \
  VARIANT(bfloat16, bfloat16, nearest, 0)                            \
  VARIANT(bfloat16, float32, nearest, 0)                             \
  VARIANT(bfloat16, bfloat16, master, fused_math::kMaster)           \
  VARIANT(bfloat16, float32, master, fused_math::kMaster)            \
  VARIANT(bfloat16, bfloat16, compensated, fused_math::kCompensated) \
  VARIANT(bfloat16, bfloat16, stochastic, fused_math::kStochastic)

struct FullVariant {
  Type parameter;
  Type velocity; // where there is momentum
  uint32_t flags; // of kCompiledFlags
  const char* kernel;
};

#define VARIANT(parameter, velocity, name, flags) \
  {Type::parameter, Type::velocity, flags, "sgd_full_tiled_" #parameter "_" #velocity "_" #name},
constexpr FullVariant kFullVariants[] = {MLX_FUSED_OPTIM_FULL_VARIANTS(VARIANT)};
#undef VARIANT
constexpr int kFullVariantCount = sizeof(kFullVariants) / sizeof(kFullVariants[0]);

/// The variant for all tensors of a step with these flags, or -1: the generic kernel.
constexpr int full_variant(Type parameter, Type velocity, uint32_t flags) {
  for (int i = 0; i < kFullVariantCount; ++i) {
    const FullVariant& variant = kFullVariants[i];
    const bool velocity_fits = !(flags & fused_math::kMomentum) || variant.velocity == velocity;
    if (variant.parameter == parameter && velocity_fits &&
        variant.flags == (flags & kCompiledFlags)) {
      return i;
    }
  }
  return -1;
}

} // namespace mlx_fused_optim::cuda
