// What one dispatch of measure_chunks works on: a table that the host fills
// (csrc/metal/measure.cpp) and passes by value, and what both sides know of the rest.
#pragma once

#include "math/norm.h"

namespace fused_metal {

enum : uint32_t {
  // A chunk goes to eight threads. Thread t has the lanes 4 t .. 4 t + 3 and those 32,
  // 64 and 96 further on: it adds the two widest halves itself, and leaves 32 numbers.
  kChunkThreads = 8,
  kChunkQuads = 4, // of lanes, a thread
  kMaxArrays = 120,
  kMeasuredSources = 26, // buffers of a dispatch in which arrays lie
};

/// Buffer slots; the first four are StepBuffer's.
enum MeasureBuffer : uint32_t {
  kChunkSumsBuffer = 4, // measure_chunks writes them, measure_arrays reads them
  kFirstMeasuredBuffer = 5, // of measure_chunks
  // Of measure_arrays:
  kFirstChunksBuffer = 0,
  kArraySumsOutBuffer = 1,
  // Of measure_finish, beside control:
  kArraySumsBuffer = 1,
  kSkippedBuffer = 2,
  kGradientCountBuffer = 3,
  kHasParametersBuffer = 4,
  kMeasuredOutBuffer = 5,
  kSkippedOutBuffer = 6,
};

/// One array of a dispatch; its elements are neighbours.
struct MeasuredArray {
  uint64_t size; // elements
  uint64_t begin; // bytes, in its source
  uint32_t first_block; // threadgroups of the arrays before it
  uint32_t first_chunk; // chunks of all arrays before it
  uint16_t source;
  uint16_t wide; // whether it is aligned to a quad
  uint16_t format; // fused_math::Format
  uint16_t is_gradient; // else a parameter
};

struct MeasureTable {
  MeasuredArray arrays[kMaxArrays];
  uint32_t count; // at least 1
  uint32_t reserved;
};

} // namespace fused_metal
