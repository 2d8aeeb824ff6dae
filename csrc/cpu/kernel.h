// The boundary between the CPU host code and the kernel, which is compiled once
// for each instruction set (see CMakeLists.txt). No standard headers with inline
// functions here or in kernel.cpp: the linker could then pick the copy that was
// compiled for a newer processor.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "math/sgd.h"

namespace mlx_fused_optim::cpu {

enum class Type : uint8_t { float32, float16, bfloat16 };

/// How to find the elements of an array that is not contiguous.
struct Strided {
  size_t first; // the element, in row-major order, that counts as element 0
  size_t dimensions;
  const int32_t* shape;
  const int64_t* strides; // elements
};

/// An array to read in row-major order.
struct Source {
  const void* data;
  const Strided* strided; // null when contiguous
  Type type;
};

/// One tensor's share of a step. Outputs are contiguous and have the type of
/// the parameter; they may be the very memory of the parameter and the velocity.
struct Tensor {
  size_t size;
  Source parameter;
  Source gradient;
  Source velocity; // data null without momentum
  void* parameter_out;
  void* velocity_out;
};

/// Updates the elements [begin, end) of a tensor.
using UpdateFunction = void (*)(
    const Tensor& tensor,
    size_t begin,
    size_t end,
    fused_math::SgdHyper hyper,
    uint32_t flags); // fused_math::SgdFlags

void update_baseline(const Tensor&, size_t, size_t, fused_math::SgdHyper, uint32_t);
#if defined(__x86_64__)
void update_avx2(const Tensor&, size_t, size_t, fused_math::SgdHyper, uint32_t);
void update_avx512(const Tensor&, size_t, size_t, fused_math::SgdHyper, uint32_t);
#endif

} // namespace mlx_fused_optim::cpu
