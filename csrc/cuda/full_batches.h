// Sorts the tensors of a full step, as cuda/batches.h does those of a plain one: into
// one launch, where the tables hold them and none lies in more than two dimensions.
#pragma once

#include "cuda/full_launch.h"
#include "cuda/packing.h"

namespace mlx_fused_optim::cuda {

/// What a tensor is beyond where it lies.
struct Member {
  uint64_t offset; // in the arena, elements
  uint32_t number; // in the layout
  uint32_t group;
  uint32_t flags;
};

class FullBatches {
 public:
  /// `slots_contiguous`: an arena that is not sends all tensors the strided way.
  FullBatches(Type type, bool slots_contiguous)
      : type_(type), slots_contiguous_(slots_contiguous) {}

  /// Adds a tensor. Throws std::invalid_argument where no kernel can read it.
  void add(
      int dimensions,
      const int32_t* shape,
      const Member& member,
      const Source& parameter,
      const Source& gradient);

  /// A launch of one empty tensor, for an arena of which only the step counts.
  void add_nothing() {
    auto& nothing = append(tiled, FullTensor{}, 1);
    nothing = {};
    nothing.columns = kTileColumns;
    gradients = bit_of(Type::float32);
  }

  size_t launches() const { return tiled.size() + strided.size(); }

  /// The dtypes of gradients, as Variant has them.
  uint32_t gradients = 0;

  BatchList<Tiled> tiled;
  BatchList<FullStrided> strided;

 private:
  Type type_;
  bool slots_contiguous_;
};

} // namespace mlx_fused_optim::cuda
