#include "cuda/kernels.h"

#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/full_variants.h"

// cuda/{sgd,full,measure}.cu, compiled: cuda/backend.cmake names the folder.
#define FATBIN(name)                                 \
  asm(".section .rodata\n"                           \
      ".balign 16\n"                                 \
      ".global mlx_fused_optim_" #name               \
      "\n"                                           \
      ".hidden mlx_fused_optim_" #name               \
      "\n"                                           \
      "mlx_fused_optim_" #name                       \
      ":\n"                                          \
      ".incbin \"" MLX_FUSED_OPTIM_FATBINS "/" #name \
      ".fatbin\"\n"                                  \
      ".previous\n");                                \
  extern "C" const unsigned char mlx_fused_optim_##name[];
FATBIN(sgd)
FATBIN(full)
FATBIN(measure)
#undef FATBIN

namespace mlx_fused_optim::cuda {

namespace {

constexpr int kKinds = 5;
constexpr int kTypes = 3;
constexpr const char* kStepNames[kKinds][kTypes] = {
    {"sgd_flat_float32", "sgd_flat_float16", "sgd_flat_bfloat16"},
    {"sgd_transposed_float32", "sgd_transposed_float16", "sgd_transposed_bfloat16"},
    {"sgd_strided_float32", "sgd_strided_float16", "sgd_strided_bfloat16"},
    {"sgd_full_tiled_float32", "sgd_full_tiled_float16", "sgd_full_tiled_bfloat16"},
    {"sgd_full_strided_float32", "sgd_full_strided_float16", "sgd_full_strided_bfloat16"}};
constexpr int kOthers = 5;
constexpr const char* kOtherNames[kOthers] =
    {"evaluate_schedule", "measure_dense", "measure_sparse", "measure_fold", "measure_finish"};

struct Kernels {
  CUfunction step[kKinds][kTypes];
  CUfunction other[kOthers];
  CUfunction variants[kFullVariantCount];
};

CUmodule load_module(const unsigned char* fatbin, int device) {
  CUmodule module;
  const auto result = cuModuleLoadData(&module, fatbin);
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
  return module;
}

CUfunction find_function(CUmodule module, const char* name) {
  CUfunction function;
  check(cuModuleGetFunction(&function, module, name), name);
  return function;
}

Kernels load(int device) {
  const CUmodule sgd = load_module(mlx_fused_optim_sgd, device);
  const CUmodule full = load_module(mlx_fused_optim_full, device);
  const CUmodule measure = load_module(mlx_fused_optim_measure, device);
  Kernels kernels;
  for (int kind = 0; kind < kKinds; ++kind) {
    const bool is_full = kind >= static_cast<int>(Kind::full_tiled);
    for (int type = 0; type < kTypes; ++type) {
      kernels.step[kind][type] = find_function(is_full ? full : sgd, kStepNames[kind][type]);
    }
  }
  for (int other = 0; other < kOthers; ++other) {
    const bool is_schedule = other == static_cast<int>(Other::schedule);
    kernels.other[other] = find_function(is_schedule ? sgd : measure, kOtherNames[other]);
  }
  for (int variant = 0; variant < kFullVariantCount; ++variant) {
    kernels.variants[variant] = find_function(full, kFullVariants[variant].kernel);
  }
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

CUfunction other_kernel(Other kernel, int device) {
  return kernels(device).other[static_cast<int>(kernel)];
}

CUfunction variant_kernel(int variant, int device) { return kernels(device).variants[variant]; }

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
