#include "cuda/kernels.h"

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "cuda/compiler.h"
#include "cuda/disk_cache.h"

namespace mlx_fused_optim::cuda {

namespace {

int attribute(CUdevice_attribute attribute, int device) {
  int value = 0;
  check(cuDeviceGetAttribute(&value, attribute, device), "cuDeviceGetAttribute");
  return value;
}

int capability_of(int device) {
  const int capability = 10 * attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device) +
      attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device);
  if (capability < kLeastCapability) {
    throw std::runtime_error(
        "[mlx_fused_optim] this GPU is not supported: got device " + std::to_string(device) +
        " of compute capability " + std::to_string(capability / 10) + "." +
        std::to_string(capability % 10) + ", allowed 8.0 or later.");
  }
  return capability;
}

/// Everything that code depends on but its text.
std::string circumstances(const Compiler& compiler) {
  int driver = 0;
  check(cuDriverGetVersion(&driver), "cuDriverGetVersion");
  std::string all = "NVRTC " + compiler.version + " driver " + std::to_string(driver);
  for (auto& option : compiler.options) {
    all += " " + option;
  }
  return all + "\n";
}

/// Those of one device. Never unloaded: MLX may launch until the process ends.
class Kernels {
 public:
  explicit Kernels(int device)
      : compiler_(capability_of(device)),
        circumstances_(circumstances(compiler_)),
        files_(DiskCache::of_user()) {}

  CUfunction get(const Variant& variant) {
    auto found = loaded_.find(variant);
    if (found != loaded_.end()) {
      return found->second;
    }
    // A process that ever comes with other options needs more memory for each, up to here.
    constexpr size_t kMostVariants = 256;
    if (loaded_.size() >= kMostVariants && variant != variant.generic()) {
      return get(variant.generic());
    }
    return loaded_[variant] = load(variant);
  }

 private:
  CUfunction load(const Variant& variant) const {
    try {
      const auto text = variant.text();
      const auto key = circumstances_ + text;
      CUfunction function = nullptr;
      if (const auto code = files_.find(key)) {
        if (load(*code, variant, function) == CUDA_SUCCESS) {
          return function;
        }
      }
      const auto code = compiler_.compile(text);
      check(load(code, variant, function), "the compiled kernel");
      files_.keep(key, code);
      return function;
    } catch (const std::exception& error) {
      throw std::runtime_error(
          "[mlx_fused_optim] a CUDA kernel does not build on this machine: got\n" +
          variant.description() + "\n" + error.what() +
          "\nPlease report this message. Until it is mended, set the environment variable "
          "MLX_FUSED_OPTIM_COMPOSED=1: the step is then made of plain MLX operations, with the "
          "same results, only slower.");
    }
  }

  static CUresult load(const std::string& code, const Variant& variant, CUfunction& function) {
    CUmodule module = nullptr;
    const auto result = cuModuleLoadData(&module, code.c_str());
    return result == CUDA_SUCCESS ? cuModuleGetFunction(&function, module, variant.name()) : result;
  }

  Compiler compiler_;
  std::string circumstances_;
  DiskCache files_;
  std::map<Variant, CUfunction> loaded_;
};

} // namespace

CUfunction kernel(const Variant& variant, int device) {
  static std::mutex mutex;
  static auto* devices = new std::map<int, Kernels>;
  std::lock_guard lock(mutex);
  return devices->try_emplace(device, device).first->second.get(variant);
}

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
