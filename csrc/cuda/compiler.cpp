#include "cuda/compiler.h"

#include <nvrtc.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <stdexcept>

namespace mlx_fused_optim::cuda {

namespace {

void check(nvrtcResult result, const char* what) {
  if (result != NVRTC_SUCCESS) {
    throw std::runtime_error(
        std::string("[mlx_fused_optim] NVRTC refused ") + what + ": got " +
        nvrtcGetErrorString(result) + ", expected NVRTC_SUCCESS.");
  }
}

/// The headers of C++ that the source includes: NVRTC has none.
constexpr const char* kHeaderNames[] = {"cstdint", "cstddef"};
constexpr const char* kHeaders[] = {
    "#pragma once\n"
    "typedef signed char int8_t; typedef unsigned char uint8_t;\n"
    "typedef short int16_t; typedef unsigned short uint16_t;\n"
    "typedef int int32_t; typedef unsigned int uint32_t;\n"
    "typedef long long int64_t; typedef unsigned long long uint64_t;\n",
    "#pragma once\n"
    "typedef decltype(sizeof(0)) size_t;\n"};

/// What NVRTC has made of a program, in two calls of its interface.
template <typename GetSize, typename Get>
std::string output(nvrtcProgram program, GetSize get_size, Get get, const char* what) {
  size_t size = 0;
  check(get_size(program, &size), what);
  std::string text(size, '\0');
  check(get(program, text.data()), what);
  return text;
}

} // namespace

Compiler::Compiler(int capability) {
  int major = 0, minor = 0, count = 0;
  check(nvrtcVersion(&major, &minor), "nvrtcVersion");
  version = std::to_string(major) + "." + std::to_string(minor);
  check(nvrtcGetNumSupportedArchs(&count), "nvrtcGetNumSupportedArchs");
  std::vector<int> known(count);
  check(nvrtcGetSupportedArchs(known.data()), "nvrtcGetSupportedArchs");
  int best = kLeastCapability;
  for (const int architecture : known) {
    best = architecture <= capability ? std::max(best, architecture) : best;
  }
  makes_machine_code = best == capability;
  options = {
      std::string("--gpu-architecture=") + (makes_machine_code ? "sm_" : "compute_") +
          std::to_string(best),
      "--std=c++17",
      "--fmad=false", // csrc/math names every rounding
      "--device-as-default-execution-space"};
}

std::string Compiler::compile(const std::string& text, std::string* log) const {
  nvrtcProgram made = nullptr;
  check(
      nvrtcCreateProgram(
          &made, text.c_str(), "kernels.cu", std::size(kHeaders), kHeaders, kHeaderNames),
      "nvrtcCreateProgram");
  auto destroy = [](nvrtcProgram* program) { nvrtcDestroyProgram(program); };
  const std::unique_ptr<nvrtcProgram, decltype(destroy)> owner(&made, destroy);
  std::vector<const char*> arguments;
  for (auto& option : options) {
    arguments.push_back(option.c_str());
  }
  const auto result = nvrtcCompileProgram(made, arguments.size(), arguments.data());
  if (result != NVRTC_SUCCESS || log) {
    auto words = output(made, nvrtcGetProgramLogSize, nvrtcGetProgramLog, "nvrtcGetProgramLog");
    if (result != NVRTC_SUCCESS) {
      throw std::runtime_error(
          "NVRTC " + version + ", " + options[0] + ", " + nvrtcGetErrorString(result) + "\n" +
          words.c_str());
    }
    *log = words.c_str();
  }
  return makes_machine_code ? output(made, nvrtcGetCUBINSize, nvrtcGetCUBIN, "nvrtcGetCUBIN")
                            : output(made, nvrtcGetPTXSize, nvrtcGetPTX, "nvrtcGetPTX");
}

} // namespace mlx_fused_optim::cuda
