#include "cuda/batches.h"

#include <stdexcept>
#include <string>
#include <utility>

namespace mlx_fused_optim::cuda {

namespace {

/// A grid's first dimension holds 2^31 - 1 blocks.
constexpr uint64_t kMaxBlocks = (uint64_t(1) << 31) - 1;

uint64_t divide_up(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

bool is_aligned(const void* data, size_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

/// Appends a tensor that takes `blocks` blocks; begins a new launch where the
/// last one is full. Leaves its members beyond Tensor's to the caller.
template <typename T>
T& append(BatchList<T>& batches, const Tensor& tensor, uint64_t blocks) {
  if (blocks > kMaxBlocks) {
    throw std::invalid_argument(
        "[fused_sgd_step] a tensor is too large for CUDA: got " + std::to_string(tensor.size) +
        " elements, allowed what " + std::to_string(kMaxBlocks) + " tiles hold.");
  }
  if (batches.empty() || batches.back()->arguments.common.count == Launch<T>::kCapacity ||
      batches.back()->blocks + blocks > kMaxBlocks) {
    // Not zeroed: 32 KB, and often one tensor.
    batches.emplace_back(new Batch<T>);
    batches.back()->arguments.common.count = 0;
    batches.back()->blocks = 0;
  }
  auto& batch = *batches.back();
  auto& added = batch.arguments.tensors[batch.arguments.common.count++];
  static_cast<Tensor&>(added) = tensor;
  added.first_block = batch.blocks;
  batch.blocks += static_cast<uint32_t>(blocks);
  return added;
}

/// Fewest dimensions in which both arrays have strides: neighbours that run on
/// in both become one, dimensions of length 1 none.
struct Collapsed {
  int dimensions = 0;
  int64_t shape[kMaxDimensions];
  int64_t parameter_strides[kMaxDimensions];
  int64_t gradient_strides[kMaxDimensions];
};

/// The strides of a contiguous array of this shape, innermost first, one a call.
class ContiguousStrides {
 public:
  int64_t next(int64_t length) {
    const int64_t stride = stride_;
    stride_ *= length;
    return stride;
  }

 private:
  int64_t stride_ = 1;
};

Collapsed collapse(
    int dimensions,
    const int32_t* shape,
    const Source& parameter,
    const Source& gradient) {
  // From the innermost outwards, and turned round at the end.
  Collapsed c;
  ContiguousStrides contiguous;
  for (int d = dimensions - 1; d >= 0; --d) {
    const int64_t stride = contiguous.next(shape[d]);
    if (shape[d] == 1) {
      continue;
    }
    const int64_t p = parameter.contiguous ? stride : parameter.strides[d];
    const int64_t g = gradient.contiguous ? stride : gradient.strides[d];
    const int last = c.dimensions - 1;
    // The kernels hold lengths in 32 bits.
    if (last >= 0 && p == c.parameter_strides[last] * c.shape[last] &&
        g == c.gradient_strides[last] * c.shape[last] && c.shape[last] * shape[d] <= INT32_MAX) {
      c.shape[last] *= shape[d];
      continue;
    }
    if (c.dimensions == kMaxDimensions) {
      throw std::invalid_argument(
          "[fused_sgd_step] a gradient lies in memory in too many dimensions: got more than " +
          std::to_string(kMaxDimensions) + " that do not collapse, allowed up to " +
          std::to_string(kMaxDimensions) + " on CUDA; pass mx.contiguous(gradient).");
    }
    c.shape[c.dimensions] = shape[d];
    c.parameter_strides[c.dimensions] = p;
    c.gradient_strides[c.dimensions] = g;
    ++c.dimensions;
  }
  for (int i = 0, j = c.dimensions - 1; i < j; ++i, --j) {
    std::swap(c.shape[i], c.shape[j]);
    std::swap(c.parameter_strides[i], c.parameter_strides[j]);
    std::swap(c.gradient_strides[i], c.gradient_strides[j]);
  }
  return c;
}

} // namespace

void Batches::add(
    int dimensions,
    const int32_t* shape,
    uint64_t offset,
    const Source& parameter,
    const Source& gradient) {
  uint64_t size = 1;
  for (int d = 0; d < dimensions; ++d) {
    size *= shape[d];
  }
  if (size == 0) {
    return;
  }
  const Tensor tensor{parameter.data, gradient.data, size, offset, 0, gradient.type};
  const uint64_t tiles = divide_up(size, tile_elements(size_of(type_)));

  if (parameter.contiguous && gradient.contiguous && velocity_contiguous_) {
    auto& flat_tensor = append(flat, tensor, tiles);
    // A thread loads as many gradients as parameters: 16 bytes of these.
    const size_t vector = 16 / size_of(type_) * size_of(gradient.type);
    flat_tensor.parameter_aligned = is_aligned(parameter.data, 16);
    flat_tensor.gradient_aligned = is_aligned(gradient.data, vector < 16 ? vector : 16);
    return;
  }

  const auto c = collapse(dimensions, shape, parameter, gradient);
  if (parameter.contiguous && velocity_contiguous_ && c.dimensions == 2 &&
      c.gradient_strides[0] == 1) {
    const uint64_t squares = divide_up(c.shape[0], kSquare) * divide_up(c.shape[1], kSquare);
    auto& turned = append(transposed, tensor, squares);
    turned.rows = c.shape[0];
    turned.columns = c.shape[1];
    turned.stride = c.gradient_strides[1];
    turned.aligned = (c.shape[0] | c.shape[1] | turned.stride) % kSquareVector == 0 &&
        is_aligned(parameter.data, kSquareVector * size_of(type_)) &&
        is_aligned(gradient.data, kSquareVector * size_of(gradient.type));
    return;
  }

  auto& any = append(strided, tensor, tiles);
  any.dimensions = c.dimensions;
  for (int d = 0; d < c.dimensions; ++d) {
    any.shape[d] = static_cast<int32_t>(c.shape[d]);
    any.parameter_strides[d] = c.parameter_strides[d];
    any.gradient_strides[d] = c.gradient_strides[d];
  }
}

} // namespace mlx_fused_optim::cuda
