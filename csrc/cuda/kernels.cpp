#include "cuda/kernels.h"

#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

// cuda/sgd.cu, compiled: cmake/cuda.cmake names the file.
asm(".section .rodata\n"
    ".balign 16\n"
    ".global mlx_fused_optim_fatbin\n"
    ".hidden mlx_fused_optim_fatbin\n"
    "mlx_fused_optim_fatbin:\n"
    ".incbin \"" MLX_FUSED_OPTIM_FATBIN
    "\"\n"
    ".previous\n");
extern "C" const unsigned char mlx_fused_optim_fatbin[];

namespace mlx_fused_optim::cuda {

namespace {

constexpr int kKinds = 3;
constexpr int kTypes = 3;
constexpr const char* kNames[kKinds][kTypes] = {
    {"sgd_flat_float32", "sgd_flat_float16", "sgd_flat_bfloat16"},
    {"sgd_transposed_float32", "sgd_transposed_float16", "sgd_transposed_bfloat16"},
    {"sgd_strided_float32", "sgd_strided_float16", "sgd_strided_bfloat16"}};

struct Kernels {
  CUfunction step[kKinds][kTypes];
  CUfunction schedule;
};

Kernels load(int device) {
  CUmodule module;
  const auto result = cuModuleLoadData(&module, mlx_fused_optim_fatbin);
  if (result == CUDA_ERROR_NO_BINARY_FOR_GPU || result == CUDA_ERROR_INVALID_IMAGE ||
      result == CUDA_ERROR_UNSUPPORTED_PTX_VERSION) {
    throw std::runtime_error(
        "[mlx_fused_optim] this GPU or its driver is not supported: got device " +
        std::to_string(device) +
        ", allowed compute capability 8.0 or later with a driver for the CUDA version that this "
        "package was built with (CUDA " +
        std::to_string(CUDA_VERSION / 1000) + ").");
  }
  check(result, "cuModuleLoadData");
  Kernels kernels;
  for (int kind = 0; kind < kKinds; ++kind) {
    for (int type = 0; type < kTypes; ++type) {
      check(
          cuModuleGetFunction(&kernels.step[kind][type], module, kNames[kind][type]),
          kNames[kind][type]);
    }
  }
  check(cuModuleGetFunction(&kernels.schedule, module, "evaluate_schedule"), "evaluate_schedule");
  return kernels;
}

/// Never unloaded: MLX may launch until the process ends.
const Kernels& kernels(int device) {
  static std::mutex mutex;
  static auto* loaded = new std::vector<std::unique_ptr<Kernels>>;
  std::lock_guard lock(mutex);
  if (loaded->size() <= static_cast<size_t>(device)) {
    loaded->resize(device + 1);
  }
  auto& entry = (*loaded)[device];
  if (!entry) {
    entry = std::make_unique<Kernels>(load(device));
  }
  return *entry;
}

} // namespace

CUfunction step_kernel(Kind kind, Type type, int device) {
  return kernels(device).step[static_cast<int>(kind)][static_cast<int>(type)];
}

CUfunction schedule_kernel(int device) { return kernels(device).schedule; }

void check(CUresult result, const char* what) {
  if (result != CUDA_SUCCESS) {
    const char* name = "an unknown error";
    cuGetErrorName(result, &name);
    throw std::runtime_error(
        std::string("[mlx_fused_optim] CUDA refused ") + what + ": got " + name +
        ", expected CUDA_SUCCESS.");
  }
}

} // namespace mlx_fused_optim::cuda
