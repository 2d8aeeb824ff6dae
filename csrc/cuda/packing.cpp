#include "cuda/packing.h"

#include <utility>

namespace mlx_fused_optim::cuda {

namespace {

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

} // namespace

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
          "[fused_step] a gradient lies in memory in too many dimensions: got more than " +
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

} // namespace mlx_fused_optim::cuda
