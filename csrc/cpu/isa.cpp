#include "cpu/isa.h"

#include <cstdlib>
#include <string>

namespace mlx_fused_optim::cpu {

namespace {

Kernels choose() {
#if defined(__x86_64__)
  const char* text = std::getenv("MLX_FUSED_OPTIM_CPU_ISA");
  const std::string wanted = text ? text : "avx512";
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl");
  if (avx512 && wanted == "avx512") {
    return kKernels_avx512;
  }
  if (avx2 && wanted != "baseline") {
    return kKernels_avx2;
  }
#endif
  return kKernels_baseline;
}

} // namespace

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

} // namespace mlx_fused_optim::cpu
