#include "cuda/variants.h"

#include <cstdio>

#include "cuda/full_launch.h"
#include "cuda_source.h" // generated: csrc/math, csrc/cuda's launches and cuda/ joined

namespace mlx_fused_optim::cuda {

namespace {

struct EntryPoint {
  const char* name;
  const char* arguments;
  const char* threads; // and blocks that are to run at once
};

/// By Kind.
constexpr EntryPoint kEntryPoints[] = {
    {"sgd_flat", "Launch<Flat>", "kThreads"},
    {"sgd_flat_few", "FewLaunch<Flat>", "kThreads"},
    {"sgd_transposed", "Launch<Transposed>", "kSquareThreads, 2"},
    {"sgd_transposed_few", "FewLaunch<Transposed>", "kSquareThreads, 2"},
    {"sgd_strided", "Launch<Strided>", "kThreads"},
    {"sgd_full_tiled", "Launch<Tiled>", "kThreads, kFullBlocks"},
    {"sgd_full_strided", "Launch<FullStrided>", "kThreads"},
    {"measure_dense", "Launch<Dense>", "kThreads"},
    {"measure_sparse", "Launch<Sparse>", "kThreads"},
    {"measure_fold", "FoldLaunch", "kFoldLanes"},
    {"measure_finish", "FinishLaunch", "kFoldLanes"},
    {"evaluate_schedule", "ScheduleLaunch", "kThreads"},
};

constexpr const char* kTypeNames[] = {"float32", "float16", "bfloat16"};

const EntryPoint& entry_point(Kind kind) { return kEntryPoints[static_cast<int>(kind)]; }
const char* name_of(Type type) { return kTypeNames[static_cast<int>(type)]; }

template <typename... Values>
std::string formatted(const char* format, Values... values) {
  char text[512];
  std::snprintf(text, sizeof(text), format, values...);
  return text;
}

} // namespace

ScheduleParts parts_of(const fused_math::Schedule& schedule) {
  ScheduleParts parts;
  for (uint32_t i = 0; i < schedule.count; ++i) {
    parts.kinds |= 1u << schedule.segments[i].kind;
    parts.flags |= schedule.segments[i].flags;
  }
  return parts;
}

ScheduleParts parts_of(const fused_math::SgdControl& control) {
  ScheduleParts parts;
  for (int i = 0; i < fused_math::kScalars; ++i) {
    if (!(control.given >> i & 1)) {
      const auto more = parts_of(control.schedules[i]);
      parts.kinds |= more.kinds;
      parts.flags |= more.flags;
    }
  }
  return parts;
}

Variant Variant::generic() const {
  Variant any = *this;
  const bool is_full = kind == Kind::full_tiled || kind == Kind::full_strided;
  any.gradients = kAnyType;
  any.flags = is_full ? kGenericFlags : flags;
  any.schedules = {~0u, ~0u};
  return any;
}

const char* Variant::name() const { return entry_point(kind).name; }

std::string Variant::description() const {
  return formatted(
      "%s: parameters %s, momentum %s, gradients %#x, flags %#x, schedules %#x %#x",
      name(),
      name_of(parameter),
      name_of(velocity),
      gradients,
      flags,
      schedules.kinds,
      schedules.flags);
}

std::string Variant::text() const {
  auto& entry = entry_point(kind);
  return formatted(
             "#define SCHEDULE_KINDS %uu\n#define SCHEDULE_FLAGS %uu\n",
             schedules.kinds,
             schedules.flags) +
      kCudaSource +
      formatted(
             "namespace mlx_fused_optim::cuda {\n"
             "extern \"C\" __global__ __launch_bounds__(%s) void %s(\n"
             "    const __grid_constant__ %s launch) {\n"
             "  run<Known<%s, %s, %uu, %uu>>(launch);\n"
             "}\n"
             "} // namespace mlx_fused_optim::cuda\n",
             entry.threads,
             entry.name,
             entry.arguments,
             name_of(parameter),
             name_of(velocity),
             gradients,
             flags);
}

} // namespace mlx_fused_optim::cuda
