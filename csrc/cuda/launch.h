// The boundary between the CUDA host code and the kernels: what a launch gets,
// by value. Compiled by g++ and NVRTC alike, and free of MLX.
#pragma once

#include <cstddef>
#include <cstdint>

#include "math/frame.h"

namespace mlx_fused_optim::cuda {

enum class Type : uint32_t { float32, float16, bfloat16, int8, bytes };

constexpr size_t size_of(Type type) {
  return type == Type::float32 ? 4 : type == Type::float16 || type == Type::bfloat16 ? 2 : 1;
}

/// Types in a set, a bit each.
constexpr uint32_t bit_of(Type type) { return uint32_t(1) << static_cast<uint32_t>(type); }
constexpr uint32_t kAnyType = 7; // that a gradient may have

/// A block of threads updates one tile of one tensor.
constexpr uint32_t kThreads = 256;

/// A thread updates this many neighbours at a time, several times: a block costs a
/// search of the table and the numbers of the step, so it should have work to do.
constexpr uint32_t kQuad = 4;
/// More where an element takes long: where moments are bytes.
constexpr uint32_t passes_of(bool has_bytes) { return has_bytes ? 8 : 4; }
constexpr uint32_t kTile = kThreads * kQuad * passes_of(false); // elements of a block

/// A gradient that is a matrix is read in tiles of this many columns: sectors are used
/// whole along its rows and the parameter's.
constexpr uint32_t kTileColumns = 16;
constexpr uint32_t kTileLanes = kTileColumns / kQuad; // threads for a row of a tile
/// Rows that a block has at a time, and from a quad of a thread to its next.
constexpr uint32_t kPassRows = kThreads / kTileLanes;
constexpr uint32_t tile_rows(bool has_bytes) { return kPassRows * passes_of(has_bytes); }

/// That of `x @ W.T` is transposed, and turned in squares of this side, in elements.
constexpr uint32_t kSquare = 64;
constexpr uint32_t kSquareThreads = 512;

/// Tensors start at multiples of this in their arena (bytes), and what lies
/// between their end and the next start is kept at zero.
constexpr uint32_t kGranule = 256;

/// What the state keeps of every element: an arena before and after the step. Null
/// where the step has none.
struct SlotArena {
  const void* data;
  void* out;
};

/// How such an arena lies before the step: element e at
/// e / columns * row_stride + e % columns * column_stride.
struct SlotWay {
  uint64_t columns;
  int64_t row_stride;
  int64_t column_stride;
};
constexpr SlotWay kContiguousWay = {1, 1, 0};

/// An arena of a launch. Outputs may be the memory of the inputs: element i is read and
/// written by one thread, in this order.
struct StepArena {
  void* parameters_out;
  uint64_t place; // of its random bits, see fused_math::random_key
  SlotArena slots[fused_math::kSlots];
};

/// In a kernel's place for StepFlags: it knows none of them, but takes those of its tensors.
/// One for masters of 24 bits, and one for all else, as formats are always known.
constexpr uint32_t kGenericMaster24Flags = ~0u;
constexpr uint32_t kGenericFlags = ~0u ^ 1u << 30;
constexpr bool is_generic(uint32_t flags) { return flags >> 31; }

/// Arenas that a launch may have.
constexpr uint32_t kArenas = 8;

/// What all tensors of a step share. An arena's place in `control` is of none of them,
/// and where one begins there is that of the first; the others begin at 0.
struct Common {
  fused_math::StepControl control;
  const uint64_t* step; // null when no number depends on it
  const float* given; // null when nothing is given
  const float* measured; // null when nothing was measured
  const float* groups; // rows of kGroupNumbers; null without groups
  uint64_t* step_out; // null but in one launch of a step
  float* used_out;
  uint32_t aligned; // a bit each arena: it and its slots start at multiples of 16 bytes
  uint32_t count; // of tensors
  StepArena arenas[kArenas];
};

/// Places in an arena are multiples of this (elements), see kGranule.
constexpr uint32_t kPlace = 64;

/// What every tensor has. Small: hundreds are to fit the arguments of one launch.
struct Tensor {
  using Shared = Common;
  const void* parameter;
  const void* gradient;
  uint64_t size; // elements
  uint32_t place; // in the arenas, in units of kPlace elements
  uint32_t first_block; // of the launch's blocks, the first that works on it
  uint32_t number; // in the layout: of its norms
  uint16_t group;
  uint16_t flags; // its own StepFlags
  Type gradient_type;
  uint32_t arena; // of the launch
};

enum Wide : uint32_t {
  kWideArenas = 1, // the parameter, and its place in aligned arenas: a quad an access
  kWideGradient = 2,
};

/// The parameter is contiguous. The gradient's element (r, c) lies at
/// r * row_stride + c * column_stride. A tensor of one dimension is a matrix of
/// kTileColumns columns, whose last row may be short.
struct Matrix : Tensor {
  uint32_t wide; // Wide
  uint32_t columns;
  int32_t row_stride;
  int32_t column_stride;
};
struct Tiled : Matrix {};

/// One whose gradient has a row_stride of 1, and everything is a multiple of kQuad.
struct Turned : Matrix {};

/// Parameter, gradient and slots lie in any way.
constexpr int kMaxDimensions = 10;
template <typename Base>
struct AnyWay : Base {
  int32_t dimensions;
  int32_t shape[kMaxDimensions];
  int64_t parameter_strides[kMaxDimensions]; // elements
  int64_t gradient_strides[kMaxDimensions];
};
struct Strided : AnyWay<Tensor> {
  SlotWay ways[fused_math::kSlots];
};

/// The arguments of one launch: as many tensors as 32764 bytes hold, which is
/// what a kernel may be given by value from sm_70 on; or fewer, see capacity_for.
constexpr size_t kArgumentBytes = 32764;
template <typename T>
constexpr uint32_t kMost = (kArgumentBytes - sizeof(typename T::Shared)) / sizeof(T);
template <typename T, uint32_t capacity = kMost<T>>
struct Launch {
  static constexpr uint32_t kCapacity = capacity;
  typename T::Shared common;
  T tensors[kCapacity];
};

/// The tensors that a kernel for `count` of them declares; 0 for as many as fit. The driver copies
/// what is declared, several times (20 to 45 us for all that fit, docs/cuda.md), and an arena that
/// waits for its gradients is alone, and usually a sixteenth of a model: 28 tensors of 448. What
/// is declared is how a larger Launch begins.
template <typename T>
constexpr uint32_t capacity_for(uint32_t count) {
  for (uint32_t capacity = 32; capacity <= 256; capacity *= 2) {
    if (count <= capacity && capacity < kMost<T>) {
      return capacity;
    }
  }
  return 0;
}
static_assert(sizeof(Launch<Tiled>) <= kArgumentBytes && Launch<Tiled>::kCapacity >= 448);
static_assert(sizeof(Launch<Tiled, 32>) <= 6144);
static_assert(sizeof(Launch<Strided>) <= kArgumentBytes);
static_assert(
    static_cast<uint32_t>(Type::float32) == fused_math::kFloat32 &&
    static_cast<uint32_t>(Type::float16) == fused_math::kFloat16 &&
    static_cast<uint32_t>(Type::bfloat16) == fused_math::kBfloat16 &&
    static_cast<uint32_t>(Type::int8) == fused_math::kInt8 &&
    static_cast<uint32_t>(Type::bytes) == fused_math::kBytes);
static_assert(fused_math::kMeasureNorm <= 0xffff, "a tensor's flags have 16 bits");

/// The arguments of the kernel that evaluates a schedule.
struct ScheduleLaunch {
  fused_math::Schedule schedule;
  const uint64_t* steps;
  float* rates;
  uint64_t size;
};

} // namespace mlx_fused_optim::cuda
