// What a launch of the full step gets, as cuda/launch.h has it for the plain one.
#pragma once

#include "cuda/launch.h"

namespace mlx_fused_optim::cuda {

static_assert(
    static_cast<uint32_t>(Type::float32) == fused_math::kFloat32 &&
    static_cast<uint32_t>(Type::float16) == fused_math::kFloat16 &&
    static_cast<uint32_t>(Type::bfloat16) == fused_math::kBfloat16);

/// A thread updates this many neighbours at a time, several times: a block costs a
/// search of the table and the numbers of the step, so it should have work to do.
constexpr uint32_t kQuad = 4;
constexpr uint32_t kPasses = 4;
constexpr uint32_t kFullTile = kThreads * kQuad * kPasses; // elements of a block

/// A gradient that is a matrix, most often the transposed one of `x @ W.T`, is read in
/// tiles of this many columns: sectors are used whole along its rows and the
/// parameter's.
constexpr uint32_t kTileColumns = 16;
constexpr uint32_t kTileLanes = kTileColumns / kQuad; // threads for a row of a tile
constexpr uint32_t kTileRows = kThreads / kTileLanes * kPasses;

/// What the state keeps of every element: an arena before and after the step. Null
/// where the step has none. Element e of one that is not contiguous lies at
/// e / columns * row_stride + e % columns * column_stride.
struct SlotArena {
  const void* data;
  void* out;
  uint64_t columns;
  int64_t row_stride;
  int64_t column_stride;
};

/// In a kernel's place for SgdFlags: it knows none of them, but takes those of its tensors.
constexpr uint32_t kGenericFlags = ~0u;

/// What all tensors of a full step share.
struct FullCommon {
  fused_math::SgdControl control;
  const uint64_t* step; // null when no number depends on it
  const float* given; // null when nothing is given
  const float* measured; // null when nothing was measured
  const float* groups; // rows of kGroupNumbers; null without groups
  uint64_t* step_out; // null but in one launch of a step
  float* used_out;
  void* parameters_out; // the arena
  SlotArena slots[fused_math::kSlots];
  uint32_t aligned; // all arenas start at multiples of 16 bytes
  uint32_t count; // of tensors
};

/// What every tensor of a full step has.
struct FullTensor : Tensor {
  using Shared = FullCommon;
  uint32_t number; // in the layout: of its norms
  uint32_t group;
  uint32_t flags;
};

enum Wide : uint32_t {
  kWideArenas = 1, // the parameter, and its place in aligned arenas: a quad an access
  kWideGradient = 2,
};

/// The parameter is contiguous. The gradient's element (r, c) lies at
/// r * row_stride + c * column_stride. A tensor of one dimension is a matrix of
/// kTileColumns columns, whose last row may be short.
struct Tiled : FullTensor {
  uint32_t wide; // Wide
  uint32_t columns;
  int64_t row_stride;
  int64_t column_stride;
};

using FullStrided = AnyWay<FullTensor>;

static_assert(sizeof(Launch<Tiled>) <= kArgumentBytes && Launch<Tiled>::kCapacity >= 320);
static_assert(sizeof(Launch<FullStrided>) <= kArgumentBytes);

} // namespace mlx_fused_optim::cuda
