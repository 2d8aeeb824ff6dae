// Sorts the tensors of a plain step by how they lie in memory, and fills the arguments
// of as few launches as hold them. No CUDA and no MLX here: tested without a GPU.
#pragma once

#include "cuda/packing.h"

namespace mlx_fused_optim::cuda {

class Batches {
 public:
  /// `velocity_contiguous`: a momentum arena that is not sends all tensors the
  /// strided way.
  Batches(Type type, bool velocity_contiguous)
      : type_(type), velocity_contiguous_(velocity_contiguous) {}

  /// Adds a tensor that starts at element `offset` of its arena. Throws
  /// std::invalid_argument where no kernel can read it.
  void add(
      int dimensions,
      const int32_t* shape,
      uint64_t offset,
      const Source& parameter,
      const Source& gradient);

  /// A launch without tensors, for an arena of which only the step counts.
  void add_nothing() {
    append(flat, Tensor{}, 1);
    flat.back()->arguments.common.count = 0;
    gradients = bit_of(Type::float32);
  }

  size_t launches() const { return flat.size() + transposed.size() + strided.size(); }

  /// The dtypes of gradients, as Variant has them.
  uint32_t gradients = 0;

  BatchList<Flat> flat;
  BatchList<Transposed> transposed;
  BatchList<Strided> strided;

 private:
  Type type_;
  bool velocity_contiguous_;
};

} // namespace mlx_fused_optim::cuda
