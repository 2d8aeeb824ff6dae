// The CPU kernel of a full step: like kernel.cpp, with more memory and more choices.
#include "cpu/blocks.h"

namespace fused_math {

template <>
struct Bits<mlx_fused_optim::cpu::Vector> {
  using type = mlx_fused_optim::cpu::VectorBits;
  MATH_MEMBER type of(mlx_fused_optim::cpu::Vector x) { return (type)x; }
  MATH_MEMBER mlx_fused_optim::cpu::Vector to(type bits) {
    return (mlx_fused_optim::cpu::Vector)bits;
  }
};

} // namespace fused_math

namespace mlx_fused_optim::cpu {
namespace {

using fused_math::kSlots;
using fused_math::SgdHyper;

/// Where a block is read from and written to, as float32; slots are null where absent.
struct Block {
  const float* parameter;
  const float* gradient;
  const float* slots[kSlots];
  float* parameter_out;
  float* slots_out[kSlots];
  uint32_t position; // of its first element in the arena
};

template <typename T>
typename fused_math::Bits<T>::type positions(uint32_t first);
template <>
inline uint32_t positions<float>(uint32_t first) {
  return first;
}
template <>
inline VectorBits positions<Vector>(uint32_t first) {
  VectorBits result;
  for (uint32_t i = 0; i < kWidth; ++i) {
    result[i] = first + i;
  }
  return result;
}

template <typename T>
__attribute__((always_inline)) inline T load_or_zero(const float* from, size_t i) {
  T value{};
  if (from) {
    memcpy(&value, from + i, sizeof(T));
  }
  return value;
}

/// Elements [i, i + width of T): everything is read before anything is written.
template <typename T>
__attribute__((always_inline)) inline void update_at(
    const Block& block,
    size_t i,
    SgdHyper hyper,
    uint32_t flags,
    Formats formats) {
  fused_math::SgdFullElements<T> e = {
      load_or_zero<T>(block.parameter, i),
      load_or_zero<T>(block.slots[fused_math::kVelocity], i),
      load_or_zero<T>(block.slots[fused_math::kMasterCopy], i),
      load_or_zero<T>(block.slots[fused_math::kCompensation], i),
      load_or_zero<T>(block.slots[fused_math::kMovingAverage], i)};
  const T gradient = load_or_zero<T>(block.gradient, i);
  const auto position = positions<T>(block.position + static_cast<uint32_t>(i));
  e = fused_math::sgd_full_element(
      e, gradient, position, hyper, flags, formats.parameter, formats.velocity);
  memcpy(block.parameter_out + i, &e.parameter, sizeof(T));
  const T slots[kSlots] = {e.velocity, e.master, e.compensation, e.average};
  for (int slot = 0; slot < kSlots; ++slot) {
    if (block.slots_out[slot]) {
      memcpy(block.slots_out[slot] + i, &slots[slot], sizeof(T));
    }
  }
}

/// Where the elements from `at` on are to be computed: in their own memory, or in
/// `buffer` to be narrowed.
float* place(Type type, void* data, size_t at, float* buffer) {
  return type == Type::float32 ? static_cast<float*>(data) + at : buffer;
}

} // namespace

void KERNEL(update_full)(
    const FullTensor& tensor,
    size_t begin,
    size_t end,
    SgdHyper hyper,
    uint32_t flags,
    Formats formats) {
  alignas(64) float parameter[kBlock], gradient[kBlock], slots[kSlots][kBlock];
  for (size_t at = begin; at < end; at += kBlock) {
    const size_t n = end - at < kBlock ? end - at : kBlock;
    Block block{};
    block.parameter = read(tensor.parameter, at, n, parameter);
    block.gradient = read(tensor.gradient, at, n, gradient);
    block.parameter_out = place(tensor.parameter.type, tensor.parameter_out, at, parameter);
    for (int slot = 0; slot < kSlots; ++slot) {
      if (tensor.slots[slot].data) {
        block.slots[slot] = read(tensor.slots[slot], at, n, slots[slot]);
        block.slots_out[slot] =
            place(tensor.slots[slot].type, tensor.slots_out[slot], at, slots[slot]);
      }
    }
    block.position = static_cast<uint32_t>(tensor.position + at);

    size_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      update_at<Vector>(block, i, hyper, flags, formats);
    }
    for (; i < n; ++i) {
      update_at<float>(block, i, hyper, flags, formats);
    }

    if (tensor.parameter.type != Type::float32) {
      write(tensor.parameter.type, tensor.parameter_out, at, n, block.parameter_out);
    }
    for (int slot = 0; slot < kSlots; ++slot) {
      if (block.slots_out[slot] && tensor.slots[slot].type != Type::float32) {
        write(tensor.slots[slot].type, tensor.slots_out[slot], at, n, block.slots_out[slot]);
      }
    }
  }
}

} // namespace mlx_fused_optim::cpu
