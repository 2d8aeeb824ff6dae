// The extension's side of the CUDA backend: finds the library beside itself.
#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "cuda/backend.h"
#include "graph/donation.h"
#include "graph/view.h"

namespace mlx_fused_optim {

namespace cuda {

namespace {

/// The folder that this extension was loaded from, with a slash.
std::string own_folder() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(&backend), &info) || !info.dli_fname) {
    return "";
  }
  const std::string path = info.dli_fname;
  return path.substr(0, path.rfind('/') + 1);
}

struct Loaded {
  const Backend* backend = nullptr;
  std::string reason;
};

Loaded load() {
  // Every symbol now: a missing one must be an error here, not a crash later.
  void* library = dlopen((own_folder() + kLibrary).c_str(), RTLD_NOW | RTLD_LOCAL);
  void* entry = library ? dlsym(library, kEntry) : nullptr;
  if (!entry) {
    return {nullptr, dlerror()};
  }
  return {reinterpret_cast<Entry>(entry)(), ""};
}

} // namespace

const Backend& backend() {
  static const Loaded loaded = load();
  if (!loaded.backend) {
    throw std::runtime_error(
        "[mlx_fused_optim] the CUDA backend does not load: got \"" + loaded.reason +
        "\", allowed where MLX has CUDA (pip install 'mlx-fused-optim[cuda13]' or [cuda12]) "
        "and this package was built with -DMLX_FUSED_OPTIM_CUDA=ON, as it is by default on "
        "Linux; pass stream=mx.cpu or set mx.set_default_device(mx.cpu) to do without.");
  }
  return *loaded.backend;
}

} // namespace cuda

void FusedStep::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  auto set = [&](const cuda::Allocate& allocate) {
    set_outputs(node_, inputs, outputs, allocate);
    return node_.outputs(outputs);
  };
  cuda::backend().step({node_, node_.inputs(inputs), set, stream()});
}

void MeasureGradients::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  cuda::backend().measure({plan_, MeasureInputs(plan_, inputs), outputs[0], outputs[1], stream()});
}

void EvaluateSchedule::eval_gpu(const std::vector<mx::array>& inputs, mx::array& output) {
  cuda::backend().evaluate_schedule(schedule_, inputs[0], output, stream());
}

void pace(mx::Stream stream) { cuda::backend().pace(stream); }

} // namespace mlx_fused_optim
