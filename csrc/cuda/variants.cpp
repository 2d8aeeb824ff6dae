#include "cuda/variants.h"

#include <bit>
#include <cstdio>

#include "cuda_source.h" // generated: csrc/math, csrc/cuda's launches and cuda/ joined

namespace mlx_fused_optim::cuda {

namespace {

struct EntryPoint {
  const char* name;
  const char* arguments; // of a capacity
  const char* threads; // and blocks that are to run at once
};

/// By Kind.
constexpr EntryPoint kEntryPoints[] = {
    {"step_tiled", "Launch<Tiled%s>", "kThreads, kTiledBlocks<%s>"},
    {"step_turned", "Launch<Turned%s>", "kSquareThreads, kTurnedBlocks<%s>"},
    {"step_strided", "Launch<Strided%s>", "kThreads"},
    {"measure_dense", "Launch<Dense%s>", "kThreads"},
    {"measure_sparse", "Launch<Sparse%s>", "kThreads"},
    {"measure_fold", "FoldLaunch", "kFoldLanes"},
    {"measure_finish", "FinishLaunch", "kFoldLanes"},
    {"evaluate_schedule", "ScheduleLaunch", "kThreads"},
};

constexpr const char* kTypeNames[] = {"float32", "float16", "bfloat16", "int8", "bytes"};

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

ScheduleParts parts_of(const fused_math::StepControl& control) {
  ScheduleParts parts;
  for (int i = 0; i < std::popcount(control.scheduled); ++i) {
    const auto more = parts_of(control.schedules[i]);
    parts.kinds |= more.kinds;
    parts.flags |= more.flags;
  }
  return parts;
}

Variant Variant::generic() const {
  Variant any = *this;
  any.gradients = kAnyType;
  if (kind <= Kind::strided && !(flags & fused_math::kDirection)) { // that is no tensor's own
    any.flags = fused_math::is_master24(flags) ? kGenericMaster24Flags : kGenericFlags;
  }
  any.schedules = {~0u, ~0u};
  any.capacity = 0;
  return any;
}

const char* Variant::name() const { return entry_point(kind).name; }

std::string Variant::description() const {
  return formatted(
      "%s: rule %u, parameters %s, state %s, gradients %#x, flags %#x, schedules %#x %#x, capacity "
      "%u",
      name(),
      rule,
      name_of(parameter),
      name_of(state),
      gradients,
      flags,
      schedules.kinds,
      schedules.flags,
      capacity);
}

std::string Variant::text() const {
  auto& entry = entry_point(kind);
  const auto known = formatted(
      "Known<%uu, %s, %s, %uu, %uu>", rule, name_of(parameter), name_of(state), gradients, flags);
  const auto declared = capacity > 0 ? formatted(", %u", capacity) : std::string();
  return formatted(
             "#define SCHEDULE_KINDS %uu\n#define SCHEDULE_FLAGS %uu\n",
             schedules.kinds,
             schedules.flags) +
      kCudaSource +
      formatted(
             "namespace mlx_fused_optim::cuda {\n"
             "extern \"C\" __global__ __launch_bounds__(%s) void %s(\n"
             "    const __grid_constant__ %s launch) {\n"
             "  run<%s>(launch);\n"
             "}\n"
             "} // namespace mlx_fused_optim::cuda\n",
             formatted(entry.threads, known.c_str()).c_str(),
             entry.name,
             formatted(entry.arguments, declared.c_str()).c_str(),
             known.c_str());
}

} // namespace mlx_fused_optim::cuda
