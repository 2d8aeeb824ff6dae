// What one dispatch of the step kernel works on: a table that the host fills
// (csrc/metal/dispatch.cpp) and passes by value, and the numbers both sides use.
#pragma once

#include "math/frame.h"

namespace fused_metal {

enum : uint32_t {
  // Metal has 31 buffer slots a dispatch: four for the numbers of a step, and the rest
  // for what it has of outputs and slots, and for sources: the buffers in which parameters
  // and gradients lie.
  kBuffers = 27,
  // The table must fit the 4 KiB that Metal takes by value.
  kMaxTensors = 48,
  // Threads of a threadgroup: a multiple of every tile's lanes and of the SIMD width,
  // and few enough that several threadgroups share a core and hide each other's loads.
  // A kernel that needs many registers gets fewer, in whole SIMD groups.
  kMostThreads = 256,
  kSimdWidth = 32,
  // A thread takes this many neighbours at once, several times: a thread costs a
  // search of the table and the learning rate, so it should have work to do.
  kQuad = 4,
  kPasses = 4,
  // A gradient that is a transposed matrix (that of every nn.Linear) is read in tiles,
  // so that cache lines are used whole in both directions: its own, and that of the
  // parameter. So wide, and as high as a threadgroup has threads for; a function
  // constant, so that a benchmark can try others. A SIMD group has whole rows.
  kTileColumns = 16,
  kMostTileColumns = kSimdWidth * kQuad,
};

/// Buffer slots of the kernels.
enum StepBuffer : uint32_t {
  kControlBuffer = 0,
  kTableBuffer = 1,
  kStepBuffer = 2,
  kGivenBuffer = 3,
  kFirstBuffer = 4, // of fused_step: kBuffers of them, see below
  // Of step_finish:
  kMeasuredBuffer = 4,
  kStepOutBuffer = 5,
  kUsedOutBuffer = 6,
};

// The places of a step's buffers, counted from kFirstBuffer. Only what a step has takes
// one, and all other places are sources. Known where a kernel is compiled.

enum : uint32_t { kParameterOutPlace = 0 };

/// Of what a slot was; what it becomes is in the next place.
MATH_FN uint32_t slot_place(uint32_t rule, uint32_t flags, int slot) {
  uint32_t place = kParameterOutPlace + 1;
  for (int before = 0; before < fused_math::kSlots; ++before) {
    place += before < slot && fused_math::has_slot(rule, flags, before) ? 2 : 0;
  }
  return place;
}
MATH_FN uint32_t measured_place(uint32_t rule, uint32_t flags) {
  return slot_place(rule, flags, fused_math::kSlots);
}
MATH_FN uint32_t groups_place(uint32_t rule, uint32_t flags) {
  return measured_place(rule, flags) + (flags & fused_math::kMeasuredFlags ? 1 : 0);
}
/// The first source.
MATH_FN uint32_t source_place(uint32_t rule, uint32_t flags) {
  return groups_place(rule, flags) + (flags & fused_math::kGroups ? 1 : 0);
}

enum StepWide : uint32_t {
  kWideArena = 1, // parameter, slots and all outputs are aligned to a quad
  kWideGradient = 2,
};

/// One tensor of a dispatch.
struct StepTensor {
  uint64_t size; // elements
  uint64_t gap; // elements behind it that become zero
  uint64_t offset; // elements, in the arenas of slots and of outputs
  uint64_t parameter; // bytes, in its source
  uint64_t gradient; // bytes, in its source
  int64_t row_stride; // of the gradient, in elements; without columns unused
  int64_t column_stride; // likewise; without columns, from element to element
  uint32_t columns; // of a matrix; 0 for a flat gradient
  uint32_t first_block; // threadgroups of the tensors before it
  uint16_t parameter_source;
  uint16_t gradient_source;
  uint16_t wide; // StepWide
  uint16_t flags; // its own StepFlags, read with kGroups
  uint32_t group; // likewise: its row of StepGroup
  uint32_t number; // in the layout: of its pair of norms
};

struct StepTable {
  StepTensor tensors[kMaxTensors];
  uint32_t count; // at least 1
  uint32_t reserved;
};

} // namespace fused_metal
