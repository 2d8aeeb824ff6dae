// The kernels of a step: indexing around csrc/math. They know when they are compiled what a
// step consists of, what is kept of each element and in which formats (Known); a group of tensors
// may be without some of it, in branches that are the same for all threads of a block.
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
template <>
constexpr uint32_t kFormatOf<bytes> = kBytes;

/// What a kernel of a step knows.
template <typename K>
struct StepKnown {
  static constexpr uint32_t kRule = K::kRule;
  static constexpr uint32_t kFormat = kFormatOf<typename K::Parameter>;
  static constexpr uint32_t kStateFormat = kFormatOf<typename K::State>;
  static constexpr uint32_t kGradients = K::kGradients;
  static constexpr uint32_t kMay = K::kFlags; // flags of some tensors
  /// Flags of every tensor. With the generic kernel's they are known at run time only.
  static constexpr uint32_t kHas = is_generic(kMay) ? 0
      : kMay & kGroups                              ? kMay & ~kTensorFlags
                                                    : kMay;
  static constexpr uint32_t kOutFormat = parameter_out_format(kHas, kFormat);
  static constexpr bool kHasMaster24 = is_master24(kMay) && kMay != kGenericFlags;
  /// Whether this kernel may meet an arena for the slot; whether there is one, its pointers say.
  static constexpr bool may_have(int slot) {
    return has_slot(kRule, kMay, slot) || (slot == kCompensation && kMay == kGenericFlags);
  }
  static constexpr uint32_t format_of_slot(int slot) {
    return slot_format(kRule, kHasMaster24 ? uint32_t(kMaster24) : 0, slot, kFormat, kStateFormat);
  }
  /// Moments in bytes: a group is of 16 neighbours among the threads, which keep together.
  static constexpr bool kHasBytes = kStateFormat == kBytes;
  /// Registers that a quad of everything takes.
  static constexpr uint32_t words() {
    uint32_t n = 2 * words_of(kFormat);
    for (int slot = 0; slot < kSlots; ++slot) {
      n += may_have(slot) ? words_of(format_of_slot(slot)) : 0;
    }
    return n;
  }
  static constexpr uint32_t words_of(uint32_t format) {
    // Of bytes also what coding takes.
    return format == kFloat32 ? 4 : format == kInt8 ? 1 : is_byte_format(format) ? 5 : 2;
  }
  /// Quads that a thread loads before it uses one: two where registers are left. Rounding at
  /// random to float16 takes many.
  static constexpr bool kRoundsToHalf =
      (kMay & kStochastic) && (kFormat == kFloat16 || kStateFormat == kFloat16);
  static constexpr uint32_t kInFlight = words() <= 12 && !kRoundsToHalf ? 2 : 1;
  static constexpr uint32_t kPasses = passes_of(kHasBytes);
};

/// As BiasesInTurn, for a warp: neighbours take one each.
struct BiasesOfLanes {
  Real of[2];
  __device__ static BiasesOfLanes at(Real first, Real second, uint64_t t) {
    const Real own = bias_of(threadIdx.x % 2 ? second : first, t);
    auto from = [&](int lane) -> Real {
      return {__shfl_sync(~0u, own.hi, lane), __shfl_sync(~0u, own.lo, lane)};
    };
    return {{from(0), from(1)}};
  }
};

/// A warp computes the numbers of the step, for this block's tensor: a lane each scalar,
/// which may be a schedule's, then all lanes the rest. None may be used before the next barrier.
template <typename Known>
__device__ void compute_numbers(
    const Common& common,
    const StepArena& arena,
    const Tensor& tensor,
    StepHyper& shared) {
  __shared__ StepScalars scalars;
  if (threadIdx.x >= 32) {
    return;
  }
  const StepControl& control = common.control;
  const uint64_t step = common.step ? *common.step : 0;
  if (threadIdx.x < kScalars) {
    const float scalar = step_scalar(control, threadIdx.x, step, common.given);
    scalars.of[threadIdx.x] = scalar;
    if (common.step_out && blockIdx.x == 0) {
      common.used_out[threadIdx.x] = scalar;
    }
  }
  __syncwarp();
  const uint32_t flags = is_generic(Known::kMay) ? control.flags : Known::kMay;
  StepHyper hyper =
      step_hyper_of<BiasesOfLanes>(control, Known::kRule, flags, step, scalars, common.measured);
  const uint32_t begin = tensor.arena == 0 ? control.begin : 0;
  hyper.key = random_key(control.seed, step, arena.place, begin);
  const StepHyper own = step_tensor_hyper<BiasesOfLanes>(
      control,
      hyper,
      Known::kRule,
      step,
      (tensor.flags & Known::kMay) | Known::kHas,
      common.groups + uint64_t(tensor.group) * kGroupNumbers,
      common.measured + kMeasuredTensors + uint64_t(tensor.number) * 2);
  if (threadIdx.x == 0) {
    shared = own;
    if (common.step_out && blockIdx.x == 0) {
      *common.step_out = step + hyper.apply;
    }
  }
}

__device__ uint64_t offset_of(const Tensor& tensor) { return uint64_t(tensor.place) * kPlace; }

/// Zeroes the gap behind the last element of a tensor; one block must do it.
template <typename Known>
__device__ void clear_gap(const StepArena& arena, const Tensor& tensor) {
  constexpr uint64_t kStep = kGranule / (Known::kFormat == kFloat32 ? 4 : 2);
  const uint64_t gap = (kStep - tensor.size % kStep) % kStep;
  if (threadIdx.x < gap) {
    const Quad zero = {};
    const uint64_t at = offset_of(tensor) + tensor.size + threadIdx.x;
    store<false>(arena.parameters_out, Known::kOutFormat, at, zero, 1);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (Known::may_have(slot) && arena.slots[slot].out) {
        store<false>(arena.slots[slot].out, Known::format_of_slot(slot), at, zero, 1);
      }
    }
  }
}

/// Blocks that a multiprocessor is to hold at once: what is on its way from memory for
/// all of them takes as long as the way. A register more a thread would be one too many.
template <typename K>
constexpr uint32_t kTiledBlocks = StepKnown<K>::words() > 24 ? 3 : 4;

// ---- Contiguous tensors, and gradients that are matrices ----------------------------

/// The way of a thread through a tensor, a quad of neighbours at a time.
struct Way {
  uint64_t at; // the next quad's first element: its place in the arenas
  int64_t gradient; // where its first gradient is, in elements
  uint32_t quads; // that are left
  uint32_t whole; // those of them, from the first on, that have kQuad elements
  uint32_t rest; // elements of each of the others
};

__device__ uint64_t step_of(const Tiled& tensor) { return uint64_t(kPassRows) * tensor.columns; }
__device__ int64_t gradient_step_of(const Tiled& tensor) {
  return int64_t(kPassRows) * tensor.row_stride;
}

/// Whether an access to the arenas is a quad. Asked each time: what is kept in a register here
/// spills elsewhere.
__device__ bool has_wide_arenas(const Common& common, const Matrix& tensor) {
  return (common.aligned >> tensor.arena & 1) && (tensor.wide & kWideArenas);
}

template <uint32_t passes>
__device__ Way find_way(const Tiled& tensor) {
  const uint32_t block = blockIdx.x - tensor.first_block;
  const uint32_t tiles = (tensor.columns + kTileColumns - 1) / kTileColumns;
  const uint32_t column = block % tiles * kTileColumns + threadIdx.x % kTileLanes * kQuad;
  const uint64_t row = uint64_t(block / tiles) * (kPassRows * passes) + threadIdx.x / kTileLanes;
  const uint64_t first = row * tensor.columns + column;
  Way way = {
      offset_of(tensor) + first,
      int64_t(row) * tensor.row_stride + int64_t(column) * tensor.column_stride,
      0,
      0,
      0};
  if (column < tensor.columns) {
    const uint32_t width = min(kQuad, tensor.columns - column);
    for (uint64_t next = first; way.quads < passes && next < tensor.size; next += step_of(tensor)) {
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
    const StepArena& arena,
    const Matrix& tensor,
    uint64_t at,
    uint32_t count) {
  load<whole>(quads.parameter, tensor.parameter, Known::kFormat, at - offset_of(tensor), 1, count);
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const void* data = arena.slots[slot].data;
    quads.slots[slot] = {};
    if (Known::may_have(slot) && data) {
      load<whole>(quads.slots[slot], data, Known::format_of_slot(slot), at, 1, count);
    }
  }
}

template <typename Known, bool whole>
__device__ void store(const Quads& quads, const StepArena& arena, uint64_t at, uint32_t count) {
  store<whole>(arena.parameters_out, Known::kOutFormat, at, quads.parameter, count);
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    void* out = arena.slots[slot].out;
    if (Known::may_have(slot) && out) {
      store<whole>(out, Known::format_of_slot(slot), at, quads.slots[slot], count);
    }
  }
}

/// Whether nothing follows from the rounded parameter, or slot, but what is stored.
template <typename Known>
constexpr bool kRoundsParameterLast =
    !(Known::kMay & (kMaster | kCompensated | kStochastic | kAverage));
template <typename Known>
constexpr bool kRoundsStateLast = !(Known::kMay & kStochastic) && !Known::kHasBytes;

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
    const float (&gradients)[kQuad],
    uint32_t position,
    const StepHyper& hyper,
    const Tensor& tensor) {
  const uint32_t flags = (tensor.flags & Known::kMay) | Known::kHas;
  constexpr uint32_t state_format = Known::kStateFormat;
  float p[kQuad], slots[kSlots][kQuad];
  widen(quads.parameter, Known::kFormat, p);
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    widen(quads.slots[slot], Known::format_of_slot(slot), slots[slot]);
  }
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    StepElement e = {
        p[k],
        {{slots[0][k], slots[1][k], slots[2][k]}},
        slots[kMasterCopy][k],
        slots[kCompensation][k],
        slots[kMovingAverage][k]};
    e = step_element(
        e,
        gradients[k],
        position + k,
        hyper,
        Known::kRule,
        flags,
        kRoundsParameterLast<Known> ? uint32_t(kFloat32) : Known::kFormat,
        kRoundsStateLast<Known> ? uint32_t(kFloat32) : state_format);
    p[k] = e.parameter;
#pragma unroll
    for (int slot = 0; slot < kRuleSlots; ++slot) {
      slots[slot][k] = e.slots.of[slot];
    }
    slots[kMasterCopy][k] = e.master;
    slots[kCompensation][k] = e.compensation;
    slots[kMovingAverage][k] = e.average;
  }
  narrow_to<kRoundsParameterLast<Known>>(Known::kOutFormat, p, quads.parameter);
#pragma unroll
  for (int slot = 0; slot < kRuleSlots; ++slot) {
    if constexpr (!Known::kHasBytes) {
      narrow_to<kRoundsStateLast<Known>>(state_format, slots[slot], quads.slots[slot]);
    } else if (has_slot(Known::kRule, flags, slot)) { // else to the bit
      narrow_to_bytes(
          Known::format_of_slot(slot),
          slots[slot],
          quads.slots[slot],
          position,
          slot,
          hyper.key,
          flags);
    }
  }
#pragma unroll
  for (int slot = kRuleSlots; slot < kSlots; ++slot) {
    narrow(slots[slot], Known::format_of_slot(slot), quads.slots[slot]);
  }
}

template <typename Known>
__device__ void update(
    Quads& quads,
    uint32_t position,
    const StepHyper& hyper,
    const Tensor& tensor) {
  float gradients[kQuad];
  widen(quads.gradient, format_of<Known::kGradients>(tensor.gradient_type), gradients);
  update<Known>(quads, gradients, position, hyper, tensor);
}

template <typename K, uint32_t capacity>
__device__ void run(const Launch<Tiled, capacity>& launch) {
  using Known = StepKnown<K>;
  constexpr uint32_t kInFlight = Known::kInFlight;
  __shared__ StepHyper shared;
  const Tiled& tensor = find_tensor(launch);
  const StepArena& arena = launch.common.arenas[tensor.arena];
  compute_numbers<Known>(launch.common, arena, tensor, shared);
  const uint32_t format = format_of<Known::kGradients>(tensor.gradient_type);
  Way way = find_way<Known::kPasses>(tensor);
  bool is_first = true;
  uint32_t turns = Known::kPasses / kInFlight; // with bytes all threads take all of them
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
    if (whole && has_wide_arenas(launch.common, tensor)) {
#pragma unroll
      for (uint32_t n = 0; n < kInFlight; ++n) {
        load<Known, true>(quads[n], arena, tensor, way.at + n * step_of(tensor), kQuad);
      }
    } else {
#pragma unroll
      for (uint32_t n = 0; n < kInFlight; ++n) {
        load<Known, false>(quads[n], arena, tensor, way.at + n * step_of(tensor), count_of(way, n));
      }
    }
    if (is_first) { // all warps but the one that computes have loaded by now
      __syncthreads();
      is_first = false;
    }
    const StepHyper hyper = shared;
    if (hyper.apply) { // else what was loaded is stored, to the bit
#pragma unroll
      for (uint32_t n = 0; n < kInFlight; ++n) {
        const auto position = static_cast<uint32_t>(way.at + n * step_of(tensor));
        update<Known>(quads[n], position, hyper, tensor);
      }
    }
    if (whole && has_wide_arenas(launch.common, tensor)) {
#pragma unroll
      for (uint32_t n = 0; n < kInFlight; ++n) {
        store<Known, true>(quads[n], arena, way.at + n * step_of(tensor), kQuad);
      }
    } else {
#pragma unroll
      for (uint32_t n = 0; n < kInFlight; ++n) {
        store<Known, false>(quads[n], arena, way.at + n * step_of(tensor), count_of(way, n));
      }
    }
    way.at += kInFlight * step_of(tensor);
    way.gradient += kInFlight * gradient_step_of(tensor);
    way.quads -= min(way.quads, kInFlight);
    way.whole -= min(way.whole, kInFlight);
  } while (Known::kHasBytes ? --turns != 0 : way.quads != 0);
  if (blockIdx.x == tensor.first_block) {
    clear_gap<Known>(arena, tensor);
  }
}

// ---- Transposed gradients -----------------------------------------------------------

/// Blocks of a multiprocessor: as above, but a thread has two quads of everything. Rounding at
/// random takes a register more.
template <typename K>
constexpr uint32_t kTurnedBlocks =
    StepKnown<K>::words() + (K::kFlags & kStochastic ? 1 : 0) <= 12 ? 2 : 1;

/// A square of the gradient, read along its rows and used along the parameter's. One more
/// column spreads a column of the square over the banks of shared memory.
template <typename K, uint32_t capacity>
__device__ void run(const Launch<Turned, capacity>& launch) {
  using Known = StepKnown<K>;
  constexpr uint32_t kPerLine = kSquare / kQuad; // threads on a line of the square
  constexpr uint32_t kLines = kSquareThreads / kPerLine; // lines at a time
  constexpr uint32_t kSteps = kSquare / kLines;
  __shared__ float turned[kSquare][kSquare + 1];
  __shared__ StepHyper shared;
  const Turned& tensor = find_tensor(launch);
  const StepArena& arena = launch.common.arenas[tensor.arena];
  const uint32_t format = format_of<Known::kGradients>(tensor.gradient_type);
  const uint32_t along = threadIdx.x % kPerLine * kQuad;
  const uint32_t line = threadIdx.x / kPerLine;
  const uint32_t square = blockIdx.x - tensor.first_block;
  const uint32_t columns = tensor.columns;
  const uint64_t rows = tensor.size / columns;
  const uint32_t squares_in_row = (columns + kSquare - 1) / kSquare;
  const uint64_t row = uint64_t(square / squares_in_row) * kSquare;
  const uint32_t column = square % squares_in_row * kSquare;

  Quads quads[kSteps];
  if constexpr (Known::kHasBytes) { // who has none keeps together with who has
#pragma unroll
    for (Quads& none : quads) {
      none = {};
    }
  }
#pragma unroll
  for (uint32_t k = 0; k < kSteps; ++k) {
    const uint32_t j = line + k * kLines;
    if (row + along < rows && column + j < columns) {
      const int64_t at = int64_t(row + along) + int64_t(column + j) * tensor.column_stride;
      load<true>(quads[k].gradient, tensor.gradient, format, at);
    }
  }
#pragma unroll
  for (uint32_t k = 0; k < kSteps; ++k) {
    const uint32_t j = line + k * kLines;
    if (row + j < rows && column + along < columns) {
      const uint64_t at = offset_of(tensor) + (row + j) * columns + column + along;
      if (has_wide_arenas(launch.common, tensor)) {
        load<Known, true>(quads[k], arena, tensor, at, kQuad);
      } else {
        load<Known, false>(quads[k], arena, tensor, at, kQuad);
      }
    }
  }
  // While they are under way: few of these large blocks run at once.
  compute_numbers<Known>(launch.common, arena, tensor, shared);
#pragma unroll
  for (uint32_t k = 0; k < kSteps; ++k) {
    float gradients[kQuad];
    widen(quads[k].gradient, format, gradients);
#pragma unroll
    for (uint32_t w = 0; w < kQuad; ++w) {
      turned[line + k * kLines][along + w] = gradients[w];
    }
  }
  __syncthreads();
  const StepHyper hyper = shared;
#pragma unroll
  for (uint32_t k = 0; k < kSteps; ++k) {
    const uint32_t j = line + k * kLines;
    const bool inside = row + j < rows && column + along < columns;
    if (inside || Known::kHasBytes) {
      const uint64_t at = offset_of(tensor) + (row + j) * columns + column + along;
      float gradients[kQuad];
#pragma unroll
      for (uint32_t w = 0; w < kQuad; ++w) {
        gradients[w] = turned[along + w][j];
      }
      if (hyper.apply) { // else what was loaded is stored, to the bit
        update<Known>(quads[k], gradients, static_cast<uint32_t>(at), hyper, tensor);
      }
      if (inside && has_wide_arenas(launch.common, tensor)) {
        store<Known, true>(quads[k], arena, at, kQuad);
      } else if (inside) {
        store<Known, false>(quads[k], arena, at, kQuad);
      }
    }
  }
  if (square == 0) {
    clear_gap<Known>(arena, tensor);
  }
}

// ---- Tensors that lie in any way --------------------------------------------------

template <typename K, uint32_t capacity>
__device__ void run(const Launch<Strided, capacity>& launch) {
  using Known = StepKnown<K>;
  __shared__ StepHyper shared;
  const Strided& tensor = find_tensor(launch);
  const StepArena& arena = launch.common.arenas[tensor.arena];
  compute_numbers<Known>(launch.common, arena, tensor, shared);
  __syncthreads();
  const StepHyper hyper = shared;
  const uint64_t begin = uint64_t(blockIdx.x - tensor.first_block) * kTile;
  const uint64_t end = min(begin + kTile, tensor.size);
  for (uint64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const Place place = find_element(tensor, i);
    const uint64_t at = offset_of(tensor) + i;
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
      const void* data = arena.slots[slot].data;
      const SlotWay& way = tensor.ways[slot];
      if (Known::may_have(slot) && data) {
        load<false>(
            quads.slots[slot],
            data,
            Known::format_of_slot(slot),
            int64_t(at / way.columns) * way.row_stride +
                int64_t(at % way.columns) * way.column_stride,
            1,
            1);
      }
    }
    if (hyper.apply) { // four of which three are zeros: simple, and seldom
      update<Known>(quads, static_cast<uint32_t>(at), hyper, tensor);
    }
    store<Known, false>(quads, arena, at, 1);
  }
  if (begin == 0) {
    clear_gap<Known>(arena, tensor);
  }
}

} // namespace
} // namespace mlx_fused_optim::cuda
