// From MLX's arrays to what the CPU kernels read.
#pragma once

#include <deque>

#include "cpu/kernel.h"
#include "mlx/array.h"

namespace mlx_fused_optim::cpu {

namespace mx = mlx::core;

inline Type type_of(mx::Dtype dtype) {
  return dtype == mx::float32 ? Type::float32
      : dtype == mx::float16  ? Type::float16
      : dtype == mx::bfloat16 ? Type::bfloat16
                              : Type::int8;
}

/// Makes sources, and keeps what they refer to: shapes and strides must outlive the
/// array's descriptor, which MLX may drop first. The data is kept by MLX until the
/// stream has passed the operation.
class Sources {
 public:
  /// The array from element `first` on, in row-major order.
  Source of(const mx::array& a, size_t first = 0) {
    if (a.flags().row_contiguous || a.size() == 0) {
      return flat(a, first);
    }
    auto& s = strided_.emplace_back(StridedArray{a.shape(), a.strides(), {}});
    s.form = {first, a.ndim(), s.shape.data(), s.strides.data()};
    return {a.data<void>(), &s.form, type_of(a.dtype())};
  }

  /// An arena of the state. Rows of bytes are in a row.
  Source arena(const mx::array& a, uint32_t format) {
    const auto type = static_cast<Type>(format);
    return fused_math::is_byte_format(format) ? Source{a.data<void>(), nullptr, type} : of(a);
  }

  /// An array that fills memory, in the order of memory.
  static Source flat(const mx::array& a, size_t first = 0) {
    return {a.data<char>() + first * a.itemsize(), nullptr, type_of(a.dtype())};
  }

 private:
  struct StridedArray {
    mx::Shape shape;
    mx::Strides strides;
    Strided form;
  };
  std::deque<StridedArray> strided_;
};

} // namespace mlx_fused_optim::cpu
