// NVRTC, NVIDIA's compiler as a library, which MLX with CUDA brings and needs itself. It needs
// no GPU. No MLX here.
#pragma once

#include <string>
#include <vector>

namespace mlx_fused_optim::cuda {

/// The least compute capability that the kernels run on, as 10 * major + minor.
constexpr int kLeastCapability = 80;

struct Compiler {
  std::string version; // NVRTC's
  std::vector<std::string> options;
  bool makes_machine_code; // else PTX, which the driver compiles

  /// For a GPU of this compute capability: machine code where NVRTC knows the GPU, else PTX of
  /// the last one before it that NVRTC knows.
  explicit Compiler(int capability);

  /// Throws std::runtime_error with the compiler's words. Those of a success go to `log`.
  std::string compile(const std::string& text, std::string* log = nullptr) const;
};

} // namespace mlx_fused_optim::cuda
