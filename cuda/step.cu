// The kernels of the full step. They know when they are compiled what a step consists of, what
// is kept of each element and in which formats (Known); a group of tensors may be without some
// of it, in branches that are the same for all threads of a block.
#pragma once

#include "quad.cuh"

namespace mlx_fused_optim::cuda {
namespace {

using namespace fused_math;

template <typename T>
constexpr uint32_t kFormatOf = kFloat32;
template <>
constexpr uint32_t kFormatOf<float16> = kFloat16;
template <>
constexpr uint32_t kFormatOf<bfloat16> = kBfloat16;

/// What a kernel of the full step knows.
template <typename K>
struct FullKnown {
  using V = typename K::Velocity;
  static constexpr uint32_t kFormat = kFormatOf<typename K::Parameter>;
  static constexpr uint32_t kVelocityFormat = kFormatOf<V>;
  static constexpr uint32_t kGradients = K::kGradients;
  static constexpr uint32_t kMay = K::kFlags; // flags of some tensors
  /// Flags of every tensor. With the generic kernel's they are known at run time only.
  static constexpr uint32_t kHas = kMay == kGenericFlags ? 0
      : kMay & kGroups                                   ? kMay & ~kTensorFlags
                                                         : kMay;
  /// Quads that a thread loads before it uses one: two where one has few bytes, and registers
  /// are left. Rounding at random to float16 takes many.
  static constexpr bool kRoundsToHalf =
      (kMay & kStochastic) && (kFormat == kFloat16 || kVelocityFormat == kFloat16);
  static constexpr uint32_t kBytes = 2 * sizeof(typename K::Parameter) + sizeof(V) +
      (kMay & kMaster ? 4 : 0) + (kMay & kCompensated ? 2 : 0) + (kMay & kAverage ? 4 : 0);
  static constexpr uint32_t kInFlight = kBytes <= 8 && !kRoundsToHalf ? 2 : 1;
};

template <typename Known>
__device__ constexpr uint32_t slot_format(int slot) {
  return slot == kVelocity    ? Known::kVelocityFormat
      : slot == kCompensation ? Known::kFormat
                              : uint32_t(kFloat32);
}

/// Whether this kernel may meet an arena for the slot; whether there is one, its pointers say.
template <typename Known>
__device__ constexpr bool may_have(int slot) {
  constexpr uint32_t flags[kSlots] = {kMomentum, kMaster, kCompensated, kAverage};
  return Known::kMay & flags[slot];
}

/// A warp computes the numbers of the step, for this block's tensor: a lane each scalar,
/// which may be a schedule's. None may be used before the next barrier.
__device__ void compute_numbers(
    const FullCommon& common,
    const FullTensor& tensor,
    SgdHyper& shared) {
  __shared__ SgdScalars scalars;
  if (threadIdx.x >= 32) {
    return;
  }
  const SgdControl& control = common.control;
  const uint64_t step = common.step ? *common.step : 0;
  if (threadIdx.x < kScalars) {
    const float scalar = sgd_full_scalar(control, threadIdx.x, step, common.given);
    scalars.of[threadIdx.x] = scalar;
    if (common.step_out && blockIdx.x == 0) {
      common.used_out[threadIdx.x] = scalar;
    }
  }
  __syncwarp();
  if (threadIdx.x != 0) {
    return;
  }
  const SgdHyper hyper = sgd_full_hyper_of(control, step, scalars, common.measured);
  if (common.step_out && blockIdx.x == 0) {
    *common.step_out = step + hyper.apply;
  }
  shared = sgd_tensor_hyper(
      hyper,
      control.trust_coefficient,
      tensor.flags,
      common.groups + uint64_t(tensor.group) * kGroupNumbers,
      common.measured + kMeasuredTensors + uint64_t(tensor.number) * 2);
}

/// Zeroes the gap behind the last element of a tensor; one block must do it.
template <typename Known>
__device__ void clear_gap(const FullCommon& common, const FullTensor& tensor) {
  constexpr uint64_t kStep = kGranule / (Known::kFormat == kFloat32 ? 4 : 2);
  const uint64_t gap = (kStep - tensor.size % kStep) % kStep;
  if (threadIdx.x < gap) {
    const Quad zero = {};
    const uint64_t at = tensor.offset + tensor.size + threadIdx.x;
    store<false>(common.parameters_out, Known::kFormat, at, zero, 1);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (may_have<Known>(slot) && common.slots[slot].out) {
        store<false>(common.slots[slot].out, slot_format<Known>(slot), at, zero, 1);
      }
    }
  }
}

/// Blocks that a multiprocessor is to hold at once: what is on its way from memory for
/// all of them takes as long as the way. A register more a thread would be one too many.
constexpr uint32_t kFullBlocks = 4;

// ---- Contiguous tensors, and gradients that are matrices ----------------------------

/// The way of a thread through a tensor, a quad of neighbours at a time.
struct Way {
  uint64_t at; // the next quad's first element: its place in the arenas
  int64_t gradient; // where its first gradient is, in elements
  uint32_t quads; // that are left
  uint32_t whole; // those of them, from the first on, that have kQuad elements
  uint32_t rest; // elements of each of the others
};

/// Rows that a block has at a time, and from a quad of a thread to its next.
constexpr uint32_t kPassRows = kThreads / kTileLanes;
__device__ uint64_t step_of(const Tiled& tensor) { return uint64_t(kPassRows) * tensor.columns; }
__device__ int64_t gradient_step_of(const Tiled& tensor) { return kPassRows * tensor.row_stride; }

__device__ Way find_way(const Tiled& tensor) {
  const uint32_t block = blockIdx.x - tensor.first_block;
  const uint32_t tiles = (tensor.columns + kTileColumns - 1) / kTileColumns;
  const uint32_t column = block % tiles * kTileColumns + threadIdx.x % kTileLanes * kQuad;
  const uint64_t row = uint64_t(block / tiles) * kTileRows + threadIdx.x / kTileLanes;
  const uint64_t first = row * tensor.columns + column;
  Way way = {
      tensor.offset + first,
      int64_t(row) * tensor.row_stride + int64_t(column) * tensor.column_stride,
      0,
      0,
      0};
  if (column < tensor.columns) {
    const uint32_t width = min(kQuad, tensor.columns - column);
    for (uint64_t next = first; way.quads < kPasses && next < tensor.size;
         next += step_of(tensor)) {
      const uint64_t left = tensor.size - next;
      way.rest = left < width ? uint32_t(left) : width;
      ++way.quads;
      way.whole += way.rest == kQuad;
    }
  }
  return way;
}

/// Up to kQuad neighbours: of the parameter, of the slots and of the gradient.
struct Quads {
  Quad parameter;
  Quad slots[kSlots];
  Quad gradient;
};

/// Elements of the way's next quad but `n`.
__device__ uint32_t count_of(const Way& way, uint32_t n) {
  return n < way.whole ? kQuad : n < way.quads ? way.rest : 0;
}

template <typename Known, bool whole>
__device__ void load(
    Quads& quads,
    const FullCommon& common,
    const Tiled& tensor,
    uint64_t at,
    uint32_t count) {
  load<whole>(quads.parameter, tensor.parameter, Known::kFormat, at - tensor.offset, 1, count);
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const void* data = common.slots[slot].data;
    quads.slots[slot] = {};
    if (may_have<Known>(slot) && data) {
      load<whole>(quads.slots[slot], data, slot_format<Known>(slot), at, 1, count);
    }
  }
}

template <typename Known, bool whole>
__device__ void store(const Quads& quads, const FullCommon& common, uint64_t at, uint32_t count) {
  store<whole>(common.parameters_out, Known::kFormat, at, quads.parameter, count);
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    void* out = common.slots[slot].out;
    if (may_have<Known>(slot) && out) {
      store<whole>(out, slot_format<Known>(slot), at, quads.slots[slot], count);
    }
  }
}

/// Whether nothing follows from the rounded parameter, or velocity, but what is stored.
template <typename Known>
constexpr bool kRoundsParameterLast =
    !(Known::kMay & (kMaster | kCompensated | kStochastic | kAverage));
template <typename Known>
constexpr bool kRoundsVelocityLast = !(Known::kMay & kStochastic);

template <bool rounds>
__device__ void narrow_to(uint32_t format, float (&values)[kQuad], Quad& quad) {
  if constexpr (rounds) {
    round_and_narrow(values, format, quad);
  } else {
    narrow(values, format, quad);
  }
}

/// `position` is that of the first element.
template <typename Known>
__device__ void update(
    Quads& quads,
    uint32_t position,
    const SgdHyper& hyper,
    const FullTensor& tensor) {
  const uint32_t flags = (tensor.flags & Known::kMay) | Known::kHas;
  constexpr uint32_t velocity_format = Known::kVelocityFormat;
  float g[kQuad], p[kQuad], v[kQuad], m[kQuad], c[kQuad], a[kQuad];
  widen(quads.gradient, format_of<Known::kGradients>(tensor.gradient_type), g);
  widen(quads.parameter, Known::kFormat, p);
  widen(quads.slots[kVelocity], velocity_format, v);
  widen(quads.slots[kMasterCopy], kFloat32, m);
  widen(quads.slots[kCompensation], Known::kFormat, c);
  widen(quads.slots[kMovingAverage], kFloat32, a);
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    SgdFullElement e = {p[k], v[k], m[k], c[k], a[k]};
    e = sgd_full_element(
        e,
        g[k],
        position + k,
        hyper,
        flags,
        kRoundsParameterLast<Known> ? uint32_t(kFloat32) : Known::kFormat,
        kRoundsVelocityLast<Known> ? uint32_t(kFloat32) : velocity_format);
    p[k] = e.parameter;
    v[k] = e.velocity;
    m[k] = e.master;
    c[k] = e.compensation;
    a[k] = e.average;
  }
  narrow_to<kRoundsParameterLast<Known>>(Known::kFormat, p, quads.parameter);
  narrow_to<kRoundsVelocityLast<Known>>(velocity_format, v, quads.slots[kVelocity]);
  narrow(m, kFloat32, quads.slots[kMasterCopy]);
  narrow(c, Known::kFormat, quads.slots[kCompensation]);
  narrow(a, kFloat32, quads.slots[kMovingAverage]);
}

template <typename K>
__device__ void run(const Launch<Tiled>& launch) {
  using Known = FullKnown<K>;
  constexpr uint32_t kInFlight = Known::kInFlight;
  __shared__ SgdHyper shared;
  const FullCommon& common = launch.common;
  const Tiled& tensor = find_tensor(launch);
  compute_numbers(common, tensor, shared);
  const bool wide_arenas = common.aligned && (tensor.wide & kWideArenas);
  const uint32_t format = format_of<Known::kGradients>(tensor.gradient_type);
  Way way = find_way(tensor);
  bool is_first = true;
#pragma unroll 1
  do {
    Quads quads[kInFlight];
    const bool whole = way.whole >= kInFlight;
    if (whole && (tensor.wide & kWideGradient)) {
#pragma unroll
      for (uint32_t n = 0; n < kInFlight; ++n) {
        load<true>(
            quads[n].gradient,
            tensor.gradient,
            format,
            way.gradient + n * gradient_step_of(tensor));
      }
    } else {
#pragma unroll
      for (uint32_t n = 0; n < kInFlight; ++n) {
        load<false>(
            quads[n].gradient,
            tensor.gradient,
            format,
            way.gradient + n * gradient_step_of(tensor),
            tensor.column_stride,
            count_of(way, n));
      }
    }
    if (whole && wide_arenas) {
#pragma unroll
      for (uint32_t n = 0; n < kInFlight; ++n) {
        load<Known, true>(quads[n], common, tensor, way.at + n * step_of(tensor), kQuad);
      }
    } else {
#pragma unroll
      for (uint32_t n = 0; n < kInFlight; ++n) {
        load<Known, false>(
            quads[n], common, tensor, way.at + n * step_of(tensor), count_of(way, n));
      }
    }
    if (is_first) { // all warps but the one that computes have loaded by now
      __syncthreads();
      is_first = false;
    }
    const SgdHyper hyper = shared;
    if (hyper.apply) { // else what was loaded is stored, to the bit
#pragma unroll
      for (uint32_t n = 0; n < kInFlight; ++n) {
        const auto position = static_cast<uint32_t>(way.at + n * step_of(tensor));
        update<Known>(quads[n], position, hyper, tensor);
      }
    }
    if (whole && wide_arenas) {
#pragma unroll
      for (uint32_t n = 0; n < kInFlight; ++n) {
        store<Known, true>(quads[n], common, way.at + n * step_of(tensor), kQuad);
      }
    } else {
#pragma unroll
      for (uint32_t n = 0; n < kInFlight; ++n) {
        store<Known, false>(quads[n], common, way.at + n * step_of(tensor), count_of(way, n));
      }
    }
    way.at += kInFlight * step_of(tensor);
    way.gradient += kInFlight * gradient_step_of(tensor);
    way.quads -= min(way.quads, kInFlight);
    way.whole -= min(way.whole, kInFlight);
  } while (way.quads != 0);
  if (blockIdx.x == tensor.first_block) {
    clear_gap<Known>(common, tensor);
  }
}

// ---- Tensors that lie in any way --------------------------------------------------

template <typename K>
__device__ void run(const Launch<FullStrided>& launch) {
  using Known = FullKnown<K>;
  __shared__ SgdHyper shared;
  const FullCommon& common = launch.common;
  const FullStrided& tensor = find_tensor(launch);
  compute_numbers(common, tensor, shared);
  __syncthreads();
  const SgdHyper hyper = shared;
  const uint64_t begin = uint64_t(blockIdx.x - tensor.first_block) * kFullTile;
  const uint64_t end = min(begin + kFullTile, tensor.size);
  for (uint64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const Place place = find_element(tensor, i);
    const uint64_t at = tensor.offset + i;
    Quads quads = {};
    load<false>(quads.parameter, tensor.parameter, Known::kFormat, place.parameter, 1, 1);
    load<false>(
        quads.gradient,
        tensor.gradient,
        format_of<Known::kGradients>(tensor.gradient_type),
        place.gradient,
        1,
        1);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const SlotArena& arena = common.slots[slot];
      if (may_have<Known>(slot) && arena.data) {
        load<false>(
            quads.slots[slot],
            arena.data,
            slot_format<Known>(slot),
            int64_t(at / arena.columns) * arena.row_stride +
                int64_t(at % arena.columns) * arena.column_stride,
            1,
            1);
      }
    }
    if (hyper.apply) { // four of which three are zeros: simple, and seldom
      update<Known>(quads, static_cast<uint32_t>(at), hyper, tensor);
    }
    store<Known, false>(quads, common, at, 1);
  }
  if (begin == 0) {
    clear_gap<Known>(common, tensor);
  }
}

} // namespace
} // namespace mlx_fused_optim::cuda
