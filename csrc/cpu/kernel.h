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

/// One tensor's share of a full step. Slots have the types of their sources, and
/// likewise may be written to the memory they are read from.
struct FullTensor {
  size_t size;
  size_t position; // of its first element in the arena
  Source parameter;
  Source gradient;
  Source slots[fused_math::kSlots]; // data null where the step has none
  void* parameter_out;
  void* slots_out[fused_math::kSlots];
};

struct Formats {
  uint32_t parameter, velocity; // fused_math::Format
};

/// The kernels for one instruction set.
struct Kernels {
  /// Updates the elements [begin, end) of a tensor.
  void (*update)(
      const Tensor& tensor,
      size_t begin,
      size_t end,
      fused_math::SgdHyper hyper,
      uint32_t flags); // fused_math::SgdFlags

  void (*update_full)(
      const FullTensor& tensor,
      size_t begin,
      size_t end,
      fused_math::SgdHyper hyper,
      uint32_t flags,
      Formats formats);

  /// A chunk of csrc/math/norm.h: the elements [begin, begin + n) of an array. A gradient
  /// is unscaled and clipped by value with these `flags`; its peak is between the two.
  fused_math::Squares (*measure)(
      const Source& source,
      size_t begin,
      size_t n,
      fused_math::SgdHyper hyper,
      uint32_t flags);
};

// ISA is that of the file that is compiled.
#define KERNEL_NAME(name, isa) name##_##isa
#define KERNEL_OF(name, isa) KERNEL_NAME(name, isa)
#define KERNEL(name) KERNEL_OF(name, ISA)
#define DECLARE_KERNELS(isa)                                                        \
  void update_##isa(const Tensor&, size_t, size_t, fused_math::SgdHyper, uint32_t); \
  void update_full_##isa(                                                           \
      const FullTensor&, size_t, size_t, fused_math::SgdHyper, uint32_t, Formats);  \
  fused_math::Squares measure_##isa(                                                \
      const Source&, size_t, size_t, fused_math::SgdHyper, uint32_t);               \
  constexpr Kernels kKernels_##isa = {update_##isa, update_full_##isa, measure_##isa};
DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
DECLARE_KERNELS(avx2)
DECLARE_KERNELS(avx512)
#endif

} // namespace mlx_fused_optim::cpu
