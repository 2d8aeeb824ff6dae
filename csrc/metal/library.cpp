#include "metal/library.h"

#include <stdexcept>

#include "math/sgd.h"
#include "metal_source.h" // generated: csrc/math and metal/ joined

namespace mlx_fused_optim::metal {

namespace {

/// Calls build(), and tells a user whose Mac refuses the kernels what to do.
template <typename Build>
auto explained(Build build) {
  try {
    return build();
  } catch (const std::exception& error) {
    throw std::runtime_error(
        std::string("[fused_sgd_step] the Metal kernels do not build on this machine: got\n") +
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

MTL::ComputePipelineState* kernel(
    mx::metal::Device& device,
    const std::string& name,
    uint32_t flags) {
  using namespace fused_math;
  const bool values[] = {
      (flags & kMomentum) != 0, (flags & kNesterov) != 0, (flags & kWeightDecay) != 0};
  mx::metal::MTLFCList constants;
  // MLX caches by this name alone, so it has every constant's value.
  std::string specialised = name + "_";
  for (size_t i = 0; i < std::size(values); ++i) {
    constants.emplace_back(&values[i], MTL::DataType::DataTypeBool, i);
    specialised += values[i] ? '1' : '0';
  }
  return explained(
      [&] { return device.get_kernel(name, library(device), specialised, constants); });
}

std::string name_of(mx::Dtype dtype) {
  return dtype == mx::float32 ? "float32" : dtype == mx::float16 ? "float16" : "bfloat16";
}

} // namespace mlx_fused_optim::metal
