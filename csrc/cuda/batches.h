// Sorts the tensors of a step by how they lie in memory, and fills the arguments of as
// few launches as hold them. No CUDA and no MLX here: tested without a GPU.
#pragma once

#include <array>

#include "cuda/packing.h"

namespace mlx_fused_optim::cuda {

/// What a tensor is beyond where it lies.
struct Member {
  uint64_t offset; // in the arena, elements
  uint32_t number; // in the layout
  uint32_t group;
  uint32_t flags;
};

/// How an arena's slots lie.
using SlotWays = std::array<SlotWay, fused_math::kSlots>;

class Batches {
 public:
  Batches(Type type, bool has_bytes) : type_(type), has_bytes_(has_bytes) {}

  /// What is added from here on is of the next arena. One with a slot that is not contiguous
  /// sends all its tensors the strided way.
  void begin_arena(const SlotWays& ways);

  /// Adds a tensor. Throws std::invalid_argument where no kernel can read it. False where it
  /// has moments in bytes and their groups are in no row of threads: its parameter and its
  /// gradient have to be contiguous then.
  bool add(
      int dimensions,
      const int32_t* shape,
      const Member& member,
      const Source& parameter,
      const Source& gradient);

  /// A launch of one empty tensor, for an arena of which only the step counts.
  void add_nothing() {
    auto& nothing = append(tiled, Tensor{}, 1);
    nothing = {};
    nothing.columns = kTileColumns;
    gradients = bit_of(Type::float32);
  }

  size_t launches() const { return tiled.size() + turned.size() + strided.size(); }

  /// The dtypes of gradients, as Variant has them.
  uint32_t gradients = 0;

  BatchList<Tiled> tiled;
  BatchList<Turned> turned;
  BatchList<Strided> strided;

 private:
  Type type_;
  bool has_bytes_;
  uint32_t arenas_ = 0;
  SlotWays ways_;
  bool slots_contiguous_ = true;
};

} // namespace mlx_fused_optim::cuda
