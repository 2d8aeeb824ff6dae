// Sorts the tensors of a step by how they lie in memory, and fills the arguments of as
// few launches as hold them. No CUDA and no MLX here: tested without a GPU.
#pragma once

#include "cuda/packing.h"

namespace mlx_fused_optim::cuda {

/// What a tensor is beyond where it lies.
struct Member {
  uint64_t offset; // in the arena, elements
  uint32_t number; // in the layout
  uint32_t group;
  uint32_t flags;
};

class Batches {
 public:
  /// `slots_contiguous`: an arena that is not sends all tensors the strided way.
  Batches(Type type, bool slots_contiguous) : type_(type), slots_contiguous_(slots_contiguous) {}

  /// Adds a tensor. Throws std::invalid_argument where no kernel can read it.
  void add(
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
  bool slots_contiguous_;
};

} // namespace mlx_fused_optim::cuda
