#include "metal/library.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "graph/step.h"
#include "metal_source.h" // generated: csrc/math and metal/ joined
#include "table.h"

namespace mlx_fused_optim::metal {

namespace {

/// Calls build(), and tells a user whose Mac refuses the kernels what to do.
template <typename Build>
auto explained(Build build) {
  try {
    return build();
  } catch (const std::exception& error) {
    throw std::runtime_error(
        std::string("[fused_step] the Metal kernels do not build on this machine: got\n") +
        error.what() +
        "\nPlease report this message. Until it is mended, set the environment variable "
        "MLX_FUSED_OPTIM_COMPOSED=1: the step is then made of plain MLX operations, with the "
        "same results, only slower.");
  }
}

MTL::Library* library(mx::metal::Device& device) {
  // Safe, as the kernels' bits must be the CPU's: no reassociation, no
  // approximation. The source itself switches contraction off.
  mx::CompileOptions options;
  options.math_mode = mx::MathMode::Safe;
  return device.get_library("mlx_fused_optim", options, [] { return std::string(kMetalSource); });
}

} // namespace

MTL::ComputePipelineState* kernel(mx::metal::Device& device, const std::string& name) {
  return explained([&] { return device.get_kernel(name, library(device)); });
}

MTL::ComputePipelineState* step_kernel(
    mx::metal::Device& device,
    const ArenaSlots& kept,
    mx::Dtype gradient,
    uint32_t tile_columns) {
  using namespace fused_math;
  // Where the rule has no slots, their format makes no kernel of its own.
  const bool has_slots = Rules::slots(kept.rule, kept.flags) > 0;
  const uint32_t values[] = {
      kept.rule,
      kept.flags,
      kept.parameter_format,
      format_of(gradient),
      has_slots ? kept.state_format : kept.parameter_format,
      tile_columns};
  mx::metal::MTLFCList constants;
  // MLX caches by this name alone, so it has every constant's value.
  std::string specialised = "fused_step";
  for (size_t i = 0; i < std::size(values); ++i) {
    constants.emplace_back(&values[i], MTL::DataType::DataTypeUInt, i);
    // A size_t: of to_string, the cross-build knows the overloads that MLX uses.
    specialised += '_';
    specialised += std::to_string(size_t(values[i]));
  }
  return explained(
      [&] { return device.get_kernel("fused_step", library(device), specialised, constants); });
}

uint32_t tile_columns() {
  const char* value = std::getenv("MLX_FUSED_OPTIM_METAL_TILE");
  if (!value || !*value) {
    return fused_metal::kTileColumns;
  }
  const std::string given = value;
  for (size_t columns = fused_metal::kQuad; columns <= fused_metal::kMostTileColumns;
       columns *= 2) {
    if (given == std::to_string(columns)) {
      return columns;
    }
  }
  throw std::invalid_argument(
      "[fused_step] MLX_FUSED_OPTIM_METAL_TILE is not the width of a tile: got '" + given +
      "', allowed 4, 8, 16, 32, 64 or 128.");
}

size_t threads_for(MTL::ComputePipelineState* kernel) {
  using namespace fused_metal;
  const size_t most = kernel->maxTotalThreadsPerThreadgroup();
  if (most < kSimdWidth) {
    throw std::runtime_error(
        "[fused_step] this GPU cannot run the Metal kernels: got threadgroups of at most " +
        std::to_string(most) + " threads, needed " + std::to_string(size_t(kSimdWidth)) +
        ". Set the environment variable MLX_FUSED_OPTIM_COMPOSED=1 to make the step of plain "
        "MLX operations.");
  }
  return std::min<size_t>(kMostThreads, most / kSimdWidth * kSimdWidth);
}

} // namespace mlx_fused_optim::metal
