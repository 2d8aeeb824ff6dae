// The kernels of the full step. What it consists of is known at run time only: the
// branches are the same for all threads of a block, and memory is what takes the time.
#include "quad.cuh"

namespace mlx_fused_optim::cuda {
namespace {

using namespace fused_math;

template <typename T>
constexpr uint32_t kFormatOf = kFloat32;
template <>
constexpr uint32_t kFormatOf<__half> = kFloat16;
template <>
constexpr uint32_t kFormatOf<__nv_bfloat16> = kBfloat16;

/// What a step of this dtype may consist of: the compiler leaves out the rest.
template <typename T>
constexpr uint32_t kFlagsOf = ~0u;
template <>
constexpr uint32_t kFlagsOf<float> = ~uint32_t(kMaster | kCompensated);

template <typename T>
__device__ uint32_t slot_format(const FullCommon& common, int slot) {
  return slot == kVelocity    ? common.control.velocity_format
      : slot == kCompensation ? kFormatOf<T>
                              : uint32_t(kFloat32);
}

/// One thread computes the numbers of the step, for this block's tensor, if it has one.
/// None may be used before the next barrier.
__device__ void compute_numbers(
    const FullCommon& common,
    const FullTensor* tensor,
    SgdHyper& shared) {
  if (threadIdx.x != 0) {
    return;
  }
  const SgdControl& control = common.control;
  const uint64_t step = *common.step;
  const SgdHyper hyper = sgd_full_hyper(control, step, common.given, common.measured);
  if (common.step_out && blockIdx.x == 0) {
    sgd_counters(control, hyper, step, common.given, common.step_out, common.used_out);
  }
  if (tensor) {
    shared = sgd_tensor_hyper(
        hyper,
        control.trust_coefficient,
        tensor->flags,
        common.groups + uint64_t(tensor->group) * kGroupNumbers,
        common.measured + kMeasuredTensors + uint64_t(tensor->number) * 2);
  }
}

/// Zeroes the gap behind the last element of a tensor; one block must do it.
template <typename T>
__device__ void clear_gap(const FullCommon& common, const FullTensor& tensor) {
  constexpr uint64_t kStep = kGranule / sizeof(T);
  const uint64_t gap = (kStep - tensor.size % kStep) % kStep;
  if (threadIdx.x < gap) {
    const Quad zero = {};
    const uint64_t at = tensor.offset + tensor.size + threadIdx.x;
    store<false>(common.parameters_out, kFormatOf<T>, at, zero, 1);
    for (int slot = 0; slot < kSlots; ++slot) {
      if (common.slots[slot].out) {
        store<false>(common.slots[slot].out, slot_format<T>(common, slot), at, zero, 1);
      }
    }
  }
}

/// Blocks that a multiprocessor is to hold at once: what is on its way from memory for
/// all of them takes as long as the way. A register more a thread would be one too many.
constexpr uint32_t kFullBlocks = 4;

// ---- Contiguous tensors, and gradients that are matrices ----------------------------

/// Up to kQuad neighbours in a tensor.
struct Piece {
  uint64_t first; // in row-major order
  int64_t gradient; // where its first gradient is, in elements
  uint32_t count; // 0: nothing left for this thread
};

__device__ Piece find_piece(const Tiled& tensor, uint32_t pass) {
  const uint32_t block = blockIdx.x - tensor.first_block;
  if (tensor.columns == 0) {
    const uint64_t first = ((uint64_t(block) * kPasses + pass) * kThreads + threadIdx.x) * kQuad;
    if (first >= tensor.size) {
      return {0, 0, 0};
    }
    const uint64_t left = tensor.size - first;
    return {first, int64_t(first) * tensor.column_stride, left < kQuad ? uint32_t(left) : kQuad};
  }
  const uint32_t tiles = (tensor.columns + kTileColumns - 1) / kTileColumns;
  const uint32_t column = block % tiles * kTileColumns + threadIdx.x % kTileLanes * kQuad;
  const uint64_t row = (uint64_t(block / tiles) * kPasses + pass) * (kThreads / kTileLanes) +
      threadIdx.x / kTileLanes;
  const uint64_t first = row * tensor.columns + column;
  if (column >= tensor.columns || first >= tensor.size) {
    return {0, 0, 0};
  }
  const uint32_t left = tensor.columns - column;
  return {
      first,
      int64_t(row) * tensor.row_stride + int64_t(column) * tensor.column_stride,
      left < kQuad ? left : kQuad};
}

/// A piece of the parameter and of the slots.
struct Quads {
  Quad parameter;
  Quad slots[kSlots];
};

template <typename T, bool whole>
__device__ void load(
    Quads& quads,
    const FullCommon& common,
    const Tiled& tensor,
    uint64_t first,
    uint32_t count) {
  load<whole>(quads.parameter, tensor.parameter, kFormatOf<T>, first, 1, count);
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const void* data = common.slots[slot].data;
    if (data) {
      load<whole>(
          quads.slots[slot], data, slot_format<T>(common, slot), tensor.offset + first, 1, count);
    }
  }
}

template <typename T, bool whole>
__device__ void store(const Quads& quads, const FullCommon& common, uint64_t at, uint32_t count) {
  store<whole>(common.parameters_out, kFormatOf<T>, at, quads.parameter, count);
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    void* out = common.slots[slot].out;
    if (out) {
      store<whole>(out, slot_format<T>(common, slot), at, quads.slots[slot], count);
    }
  }
}

/// `position` is that of the first element.
template <typename T>
__device__ void update(
    Quads& quads,
    const Quad& gradient,
    uint32_t position,
    const SgdHyper& hyper,
    const FullCommon& common,
    const FullTensor& tensor) {
  const uint32_t flags = tensor.flags & kFlagsOf<T>;
  const uint32_t velocity_format = common.control.velocity_format;
  float g[kQuad], p[kQuad], v[kQuad], m[kQuad], c[kQuad], a[kQuad];
  widen(gradient, static_cast<uint32_t>(tensor.gradient_type), g);
  widen(quads.parameter, kFormatOf<T>, p);
  widen(quads.slots[kVelocity], velocity_format, v);
  widen(quads.slots[kMasterCopy], kFloat32, m);
  widen(quads.slots[kCompensation], kFormatOf<T>, c);
  widen(quads.slots[kMovingAverage], kFloat32, a);
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    SgdFullElement e = {p[k], v[k], m[k], c[k], a[k]};
    e = sgd_full_element(e, g[k], position + k, hyper, flags, kFormatOf<T>, velocity_format);
    p[k] = e.parameter;
    v[k] = e.velocity;
    m[k] = e.master;
    c[k] = e.compensation;
    a[k] = e.average;
  }
  narrow(p, kFormatOf<T>, quads.parameter);
  narrow(v, velocity_format, quads.slots[kVelocity]);
  narrow(m, kFloat32, quads.slots[kMasterCopy]);
  narrow(c, kFormatOf<T>, quads.slots[kCompensation]);
  narrow(a, kFloat32, quads.slots[kMovingAverage]);
}

template <typename T>
__device__ void update(const Launch<Tiled>& launch) {
  __shared__ SgdHyper shared;
  const FullCommon& common = launch.common;
  if (common.count == 0) { // an arena without tensors: only the step counts
    compute_numbers(common, nullptr, shared);
    return;
  }
  const Tiled& tensor = find_tensor(launch);
  compute_numbers(common, &tensor, shared);
  __syncthreads();
  const SgdHyper hyper = shared;
  const bool wide = common.aligned && (tensor.wide & kWideArenas);
  const auto gradient_format = static_cast<uint32_t>(tensor.gradient_type);
#pragma unroll 1
  for (uint32_t pass = 0; pass < kPasses; ++pass) {
    const Piece piece = find_piece(tensor, pass);
    if (piece.count == 0) {
      break; // later passes lie further on
    }
    const bool whole = piece.count == kQuad && wide;
    Quads quads = {};
    Quad gradient = {};
    if (whole) {
      load<T, true>(quads, common, tensor, piece.first, kQuad);
    } else {
      load<T, false>(quads, common, tensor, piece.first, piece.count);
    }
    if (piece.count == kQuad && (tensor.wide & kWideGradient)) {
      load<true>(gradient, tensor.gradient, gradient_format, piece.gradient);
    } else {
      load<false>(
          gradient,
          tensor.gradient,
          gradient_format,
          piece.gradient,
          tensor.column_stride,
          piece.count);
    }
    const uint64_t at = tensor.offset + piece.first;
    if (hyper.apply) { // else what was loaded is stored, to the bit
      update<T>(quads, gradient, static_cast<uint32_t>(at), hyper, common, tensor);
    }
    if (whole) {
      store<T, true>(quads, common, at, kQuad);
    } else {
      store<T, false>(quads, common, at, piece.count);
    }
  }
  if (blockIdx.x == tensor.first_block) {
    clear_gap<T>(common, tensor);
  }
}

// ---- Tensors that lie in any way --------------------------------------------------

template <typename T>
__device__ void update(const Launch<FullStrided>& launch) {
  __shared__ SgdHyper shared;
  const FullCommon& common = launch.common;
  const FullStrided& tensor = find_tensor(launch);
  compute_numbers(common, &tensor, shared);
  __syncthreads();
  const SgdHyper hyper = shared;
  const uint64_t begin = uint64_t(blockIdx.x - tensor.first_block) * kFullTile;
  const uint64_t end = min(begin + kFullTile, tensor.size);
  for (uint64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const Place place = find_element(tensor, i);
    const uint64_t at = tensor.offset + i;
    Quads quads = {};
    Quad gradient = {};
    load<false>(quads.parameter, tensor.parameter, kFormatOf<T>, place.parameter, 1, 1);
    load<false>(
        gradient,
        tensor.gradient,
        static_cast<uint32_t>(tensor.gradient_type),
        place.gradient,
        1,
        1);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const SlotArena& arena = common.slots[slot];
      if (arena.data) {
        load<false>(
            quads.slots[slot],
            arena.data,
            slot_format<T>(common, slot),
            int64_t(at / arena.columns) * arena.row_stride +
                int64_t(at % arena.columns) * arena.column_stride,
            1,
            1);
      }
    }
    if (hyper.apply) { // four of which three are zeros: simple, and seldom
      update<T>(quads, gradient, static_cast<uint32_t>(at), hyper, common, tensor);
    }
    store<T, false>(quads, common, at, 1);
  }
  if (begin == 0) {
    clear_gap<T>(common, tensor);
  }
}

} // namespace

// ---- Entry points: sgd_full_<kind>_<dtype>, as csrc/cuda/kernels.cpp names them -------

#define KERNELS(T, name)                                                          \
  extern "C" __global__ __launch_bounds__(kThreads) void sgd_full_tiled_##name(   \
      const __grid_constant__ Launch<Tiled> launch) {                             \
    update<T>(launch);                                                            \
  }                                                                               \
  extern "C" __global__ __launch_bounds__(kThreads) void sgd_full_strided_##name( \
      const __grid_constant__ Launch<FullStrided> launch) {                       \
    update<T>(launch);                                                            \
  }
KERNELS(float, float32)
KERNELS(__half, float16)
KERNELS(__nv_bfloat16, bfloat16)
#undef KERNELS

} // namespace mlx_fused_optim::cuda
