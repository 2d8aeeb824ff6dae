// The CPU kernel of a plain step: the loop over a block is csrc/math's element on
// vectors. Each build of this file has its own instruction set, which ISA names.
#include "cpu/blocks.h"

namespace mlx_fused_optim::cpu {
namespace {

using fused_math::SgdHyper;

// The loop goes by cache lines of float32 and asks for the one that it will want
// kAhead elements later. The hardware's prefetchers stop at every page, and five
// streams cross many of them.
constexpr size_t kLine = 16;
constexpr size_t kAhead = 128;

/// Elements [i, i + width of T). An output may be its own input, element for
/// element: everything is read before anything is written.
template <typename T, uint32_t flags>
__attribute__((always_inline)) inline void update_at(
    size_t i,
    const float* parameter,
    const float* gradient,
    const float* velocity,
    float* parameter_out,
    float* velocity_out,
    SgdHyper hyper) {
  constexpr bool has_momentum = flags & fused_math::kMomentum;
  fused_math::SgdElements<T> e{};
  T g;
  memcpy(&e.parameter, parameter + i, sizeof(T));
  memcpy(&g, gradient + i, sizeof(T));
  if (has_momentum) {
    memcpy(&e.velocity, velocity + i, sizeof(T));
  }
  e = fused_math::sgd_element(e, g, hyper, flags);
  memcpy(parameter_out + i, &e.parameter, sizeof(T));
  if (has_momentum) {
    memcpy(velocity_out + i, &e.velocity, sizeof(T));
  }
}

template <uint32_t flags>
void update_block(
    const float* parameter,
    const float* gradient,
    const float* velocity,
    float* parameter_out,
    float* velocity_out,
    size_t n,
    SgdHyper hyper) {
  size_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    __builtin_prefetch(parameter + i + kAhead);
    __builtin_prefetch(gradient + i + kAhead);
    if (flags & fused_math::kMomentum) {
      __builtin_prefetch(velocity + i + kAhead);
    }
    for (size_t j = i; j < i + kLine; j += kWidth) {
      update_at<Vector, flags>(
          j, parameter, gradient, velocity, parameter_out, velocity_out, hyper);
    }
  }
  for (; i < n; ++i) {
    update_at<float, flags>(i, parameter, gradient, velocity, parameter_out, velocity_out, hyper);
  }
}

} // namespace

void KERNEL(
    update)(const Tensor& tensor, size_t begin, size_t end, SgdHyper hyper, uint32_t flags) {
  alignas(64) float parameter_block[kBlock], gradient_block[kBlock], velocity_block[kBlock];
  const Type type = tensor.parameter.type;
  const bool direct = type == Type::float32;
  const bool has_momentum = flags & fused_math::kMomentum;
  static constexpr decltype(&update_block<0>) blocks[] = {
      update_block<0>,
      update_block<1>,
      update_block<2>,
      update_block<3>,
      update_block<4>,
      update_block<5>,
      update_block<6>,
      update_block<7>};
  const auto update = blocks[flags & 7];
  // Without conversions or gathers there is no buffer to fill: one long block.
  const bool whole = direct && tensor.gradient.type == Type::float32 && !tensor.parameter.strided &&
      !tensor.gradient.strided && !tensor.velocity.strided;
  const size_t step = whole ? end - begin : kBlock;

  for (size_t at = begin; at < end; at += step) {
    const size_t n = end - at < step ? end - at : step;
    const float* p = read(tensor.parameter, at, n, parameter_block);
    const float* g = read(tensor.gradient, at, n, gradient_block);
    const float* v = has_momentum ? read(tensor.velocity, at, n, velocity_block) : nullptr;
    float* p_out = direct ? static_cast<float*>(tensor.parameter_out) + at : parameter_block;
    float* v_out =
        direct && has_momentum ? static_cast<float*>(tensor.velocity_out) + at : velocity_block;
    update(p, g, v, p_out, v_out, n, hyper);
    if (!direct) {
      write(type, tensor.parameter_out, at, n, p_out);
      if (has_momentum) {
        write(type, tensor.velocity_out, at, n, v_out);
      }
    }
  }
}

} // namespace mlx_fused_optim::cpu
