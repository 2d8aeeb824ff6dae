// The boundary between the CPU host code and the kernel, which is compiled once
// for each instruction set (see CMakeLists.txt). No standard headers with inline
// functions here or in kernel.cpp: the linker could then pick the copy that was
// compiled for a newer processor.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "math/frame.h"

namespace mlx_fused_optim::cpu {

/// fused_math::Format.
enum class Type : uint8_t { float32, float16, bfloat16, int8, bytes, byte_squares };

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

/// The arenas of a step. Outputs have the types of what they replace, but for a direction, and
/// may be the very memory that it is read from.
struct Arenas {
  Source slots[fused_math::kSlots]; // data null where the step has none
  void* parameter_out; // null without tensors
  Type parameter_out_type;
  void* slots_out[fused_math::kSlots];
};

/// One tensor's share of a step.
struct Tensor {
  size_t size;
  size_t position; // of its first element in the arenas
  Source parameter;
  Source gradient;
};

/// What a step consists of, for one tensor.
struct Form {
  uint32_t rule; // its place in fused_math::Rules
  uint32_t flags; // fused_math::StepFlags
  uint32_t parameter_format, state_format; // fused_math::Format
};

/// The kernels for one instruction set.
struct Kernels {
  /// Updates the elements [begin, end) of a tensor, which are whole groups of bytes.h but for
  /// its last one.
  void (*update)(
      const Arenas& arenas,
      const Tensor& tensor,
      size_t begin,
      size_t end,
      fused_math::StepHyper hyper,
      Form form);

  /// A chunk of csrc/math/norm.h: the elements [begin, begin + n) of an array. A gradient
  /// is unscaled and clipped by value with these `flags`; its peak is between the two.
  fused_math::Squares (*measure)(
      const Source& source,
      size_t begin,
      size_t n,
      fused_math::StepHyper hyper,
      uint32_t flags);
};

// ISA is that of the file that is compiled.
#define KERNEL_NAME(name, isa) name##_##isa
#define KERNEL_OF(name, isa) KERNEL_NAME(name, isa)
#define KERNEL(name) KERNEL_OF(name, ISA)
#define DECLARE_KERNELS(isa)                                                                    \
  void update_##isa(const Arenas&, const Tensor&, size_t, size_t, fused_math::StepHyper, Form); \
  fused_math::Squares measure_##isa(                                                            \
      const Source&, size_t, size_t, fused_math::StepHyper, uint32_t);                          \
  constexpr Kernels kKernels_##isa = {update_##isa, measure_##isa};
DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
DECLARE_KERNELS(avx2)
DECLARE_KERNELS(avx512)
#endif

} // namespace mlx_fused_optim::cpu
