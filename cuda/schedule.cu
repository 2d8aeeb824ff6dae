// The kernels of the plain step, and of a schedule: indexing around csrc/math. What becomes an
// entry point, csrc/cuda/variants.cpp says.
#pragma once

#include "common.cuh"

namespace mlx_fused_optim::cuda {
namespace {

using fused_math::SgdElement;
using fused_math::SgdHyper;

template <typename T>
constexpr uint32_t kTile = tile_elements(sizeof(T));

/// One thread computes the numbers of the step, while the others go on: none may be
/// used before the next barrier.
__device__ void compute_numbers(const Common& common, SgdHyper& shared) {
  if (threadIdx.x == 0) {
    const uint64_t step = common.step ? *common.step : 0;
    shared = fused_math::sgd_hyper(common.control, step, common.given);
    if (common.step_out && blockIdx.x == 0) {
      *common.step_out = step + 1;
      common.used_out[fused_math::kLearningRate] = shared.learning_rate;
      common.used_out[fused_math::kMomentumFactor] = shared.momentum;
      common.used_out[fused_math::kWeightDecayFactor] = shared.weight_decay;
      common.used_out[fused_math::kGradScaleFactor] = 1.0f;
    }
  }
}

// ---- Contiguous tensors ---------------------------------------------------------

/// The integers that a thread moves in one access.
template <int bytes>
struct Word;
template <>
struct Word<2> {
  using Type = unsigned short;
};
template <>
struct Word<4> {
  using Type = unsigned int;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};

/// N elements that lie together, in registers.
template <typename T, int N>
struct Vector {
  static constexpr int kBytes = N * sizeof(T);
  using Words = typename Word<(kBytes < 16 ? kBytes : 16)>::Type;
  static constexpr int kWords = kBytes / sizeof(Words);
  alignas(Words) T x[N];
};

// The cache operators are those of any load and store: marking them as streaming,
// all or some, was no faster on an H200 (docs/cuda.md), and new parameters are soon
// read again. But spelt out they stay one access, where the compiler would split the
// copy of a vector of half types.
template <typename T, int N>
__device__ void load_whole(Vector<T, N>& vector, const T* from) {
  using Words = typename Vector<T, N>::Words;
#pragma unroll
  for (int k = 0; k < Vector<T, N>::kWords; ++k) {
    reinterpret_cast<Words*>(vector.x)[k] = __ldca(reinterpret_cast<const Words*>(from) + k);
  }
}

template <typename T, int N>
__device__ void store_whole(T* to, const Vector<T, N>& vector) {
  using Words = typename Vector<T, N>::Words;
#pragma unroll
  for (int k = 0; k < Vector<T, N>::kWords; ++k) {
    __stwb(reinterpret_cast<Words*>(to) + k, reinterpret_cast<const Words*>(vector.x)[k]);
  }
}

/// The first `n` elements are read, the others are zero.
template <typename T, int N>
__device__ void load(Vector<T, N>& vector, const T* from, int n, bool aligned) {
  if (aligned && n >= N) {
    load_whole(vector, from);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      vector.x[k] = k < n ? from[k] : from_float<T>(0.0f);
    }
  }
}

template <typename T, int N>
__device__ void store(T* to, const Vector<T, N>& vector, bool aligned) {
  if (aligned) {
    store_whole(to, vector);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      to[k] = vector.x[k];
    }
  }
}

template <typename Known, typename G>
__device__ void update_tile(const Common& common, const Flat& tensor, const SgdHyper& shared) {
  using T = typename Known::Parameter;
  constexpr int N = 16 / sizeof(T);
  const uint64_t begin = uint64_t(blockIdx.x - tensor.first_block) * kTile<T>;
  // Elements from here to the end of the tensor, and of the gap behind it; both
  // no more than int holds, as no tile is longer.
  const uint64_t rest = tensor.size - begin;
  const int size = rest < kTile<T> ? rest : kTile<T>;
  constexpr int kStep = kGranule / sizeof(T);
  const int padded = (size + kStep - 1) / kStep * kStep;

  const uint64_t at = tensor.offset + begin;
  const T* parameter = static_cast<const T*>(tensor.parameter) + begin;
  const G* gradient = static_cast<const G*>(tensor.gradient) + begin;
  const T* velocity = static_cast<const T*>(common.velocity) + at;
  T* parameter_out = static_cast<T*>(common.parameters_out) + at;
  T* velocity_out = static_cast<T*>(common.velocity_out) + at;
  constexpr uint32_t flags = Known::kFlags;
  constexpr bool has_momentum = flags & fused_math::kMomentum;

  // All loads before the first use.
  Vector<T, N> p[kVectors], v[kVectors];
  Vector<G, N> g[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int i = (j * kThreads + threadIdx.x) * N;
    if (i < padded) {
      load(p[j], parameter + i, size - i, tensor.parameter_aligned);
      load(g[j], gradient + i, size - i, tensor.gradient_aligned);
      if (has_momentum) {
        load(v[j], velocity + i, size - i, common.aligned);
      }
    }
  }
  __syncthreads();
  const SgdHyper hyper = shared;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int i = (j * kThreads + threadIdx.x) * N;
    if (i < padded) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        SgdElement e = {to_float(p[j].x[k]), has_momentum ? to_float(v[j].x[k]) : 0.0f};
        e = fused_math::sgd_element(e, to_float(g[j].x[k]), hyper, flags);
        // In the gap the update of zeros could be NaN: the rate may be infinite.
        const bool inside = i + k < size;
        p[j].x[k] = from_float<T>(inside ? e.parameter : 0.0f);
        v[j].x[k] = from_float<T>(inside ? e.velocity : 0.0f);
      }
      store(parameter_out + i, p[j], common.aligned);
      if (has_momentum) {
        store(velocity_out + i, v[j], common.aligned);
      }
    }
  }
}

template <typename Known, uint32_t capacity>
__device__ void run(const Launch<Flat, capacity>& launch) {
  __shared__ SgdHyper hyper;
  compute_numbers(launch.common, hyper);
  if (launch.common.count == 0) { // an arena without tensors: only the step counts
    return;
  }
  const Flat& tensor = find_tensor(launch);
  with_type<Known::kGradients>(tensor.gradient_type, [&](auto g) {
    update_tile<Known, decltype(g)>(launch.common, tensor, hyper);
  });
}

// ---- Tensors whose gradient is transposed -----------------------------------------

/// Zeroes the gap behind the last element of a tensor; one block must do it.
template <typename T>
__device__ void clear_gap(const Common& common, const Tensor& tensor) {
  constexpr uint64_t kStep = kGranule / sizeof(T);
  const uint64_t gap = (kStep - tensor.size % kStep) % kStep;
  if (threadIdx.x < gap) {
    const uint64_t at = tensor.offset + tensor.size + threadIdx.x;
    static_cast<T*>(common.parameters_out)[at] = from_float<T>(0.0f);
    if (common.velocity_out) {
      static_cast<T*>(common.velocity_out)[at] = from_float<T>(0.0f);
    }
  }
}

// A tile of the gradient, read along its rows and used along the parameter's. One
// more column spreads a column of the tile over the banks of shared memory.
using Square = float[kSquare][kSquare + 1];

/// W elements at a time; rows, columns and stride are multiples of W.
template <typename Known, typename G, int W>
__device__ void update_square(
    const Common& common,
    const Transposed& tensor,
    Square& turned,
    SgdHyper& shared) {
  using T = typename Known::Parameter;
  constexpr int kPerLine = kSquare / W; // threads on a line of the tile
  constexpr int kLines = kSquareThreads / kPerLine; // lines at a time
  constexpr int kSteps = kSquare / kLines;
  const uint32_t along = threadIdx.x % kPerLine * W;
  const uint32_t line = threadIdx.x / kPerLine;

  const uint32_t tile = blockIdx.x - tensor.first_block;
  const uint64_t tiles_in_row = (tensor.columns + kSquare - 1) / kSquare;
  const uint64_t row = tile / tiles_in_row * kSquare;
  const uint64_t column = tile % tiles_in_row * kSquare;
  const T* parameter = static_cast<const T*>(tensor.parameter);
  const G* gradient = static_cast<const G*>(tensor.gradient);
  const T* velocity = static_cast<const T*>(common.velocity) + tensor.offset;
  T* parameter_out = static_cast<T*>(common.parameters_out) + tensor.offset;
  T* velocity_out = static_cast<T*>(common.velocity_out) + tensor.offset;
  constexpr uint32_t flags = Known::kFlags;
  constexpr bool has_momentum = flags & fused_math::kMomentum;

  // All loads before the first use.
  Vector<G, W> g[kSteps];
  Vector<T, W> p[kSteps], v[kSteps];
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const uint32_t j = line + k * kLines;
    if (row + along < tensor.rows && column + j < tensor.columns) {
      load_whole(g[k], gradient + int64_t(row + along) + int64_t(column + j) * tensor.stride);
    }
    if (row + j < tensor.rows && column + along < tensor.columns) {
      const uint64_t i = (row + j) * tensor.columns + column + along;
      load_whole(p[k], parameter + i);
      if (has_momentum) {
        load_whole(v[k], velocity + i);
      }
    }
  }
  // While they are under way: few of these large blocks run at once.
  compute_numbers(common, shared);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int w = 0; w < W; ++w) {
      turned[line + k * kLines][along + w] = to_float(g[k].x[w]);
    }
  }
  __syncthreads();
  const SgdHyper hyper = shared;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const uint32_t j = line + k * kLines;
    if (row + j < tensor.rows && column + along < tensor.columns) {
#pragma unroll
      for (int w = 0; w < W; ++w) {
        SgdElement e = {to_float(p[k].x[w]), has_momentum ? to_float(v[k].x[w]) : 0.0f};
        e = fused_math::sgd_element(e, turned[along + w][j], hyper, flags);
        p[k].x[w] = from_float<T>(e.parameter);
        v[k].x[w] = from_float<T>(e.velocity);
      }
      const uint64_t i = (row + j) * tensor.columns + column + along;
      store_whole(parameter_out + i, p[k]);
      if (has_momentum) {
        store_whole(velocity_out + i, v[k]);
      }
    }
  }
  if (tile == 0) {
    clear_gap<T>(common, tensor);
  }
}

template <typename Known, uint32_t capacity>
__device__ void run(const Launch<Transposed, capacity>& launch) {
  __shared__ Square turned;
  __shared__ SgdHyper hyper;
  const Transposed& tensor = find_tensor(launch);
  with_type<Known::kGradients>(tensor.gradient_type, [&](auto g) {
    if (tensor.aligned && launch.common.aligned) {
      update_square<Known, decltype(g), kSquareVector>(launch.common, tensor, turned, hyper);
    } else {
      update_square<Known, decltype(g), 1>(launch.common, tensor, turned, hyper);
    }
  });
}

// ---- Tensors that lie in any way --------------------------------------------------

template <typename Known>
__device__ void run(const Launch<Strided>& launch) {
  using T = typename Known::Parameter;
  const Common& common = launch.common;
  const Strided& tensor = find_tensor(launch);
  const T* parameter = static_cast<const T*>(tensor.parameter);
  const T* velocity = static_cast<const T*>(common.velocity);
  __shared__ SgdHyper shared;
  compute_numbers(common, shared);
  __syncthreads();
  const SgdHyper hyper = shared;
  const uint32_t tile = blockIdx.x - tensor.first_block;
  const uint64_t begin = uint64_t(tile) * kTile<T>;
  const uint64_t end = min(begin + kTile<T>, tensor.size);
  for (uint64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const Place place = find_element(tensor, i);
    float gradient;
    with_type<Known::kGradients>(tensor.gradient_type, [&](auto g) {
      gradient = to_float(static_cast<const decltype(g)*>(tensor.gradient)[place.gradient]);
    });
    const uint64_t at = tensor.offset + i;
    SgdElement e = {to_float(parameter[place.parameter]), 0.0f};
    if (velocity) {
      e.velocity = to_float(
          velocity
              [int64_t(at / common.velocity_columns) * common.velocity_row_stride +
               int64_t(at % common.velocity_columns) * common.velocity_column_stride]);
    }
    e = fused_math::sgd_element(e, gradient, hyper, Known::kFlags);
    static_cast<T*>(common.parameters_out)[at] = from_float<T>(e.parameter);
    if (velocity) {
      static_cast<T*>(common.velocity_out)[at] = from_float<T>(e.velocity);
    }
  }
  if (tile == 0) {
    clear_gap<T>(common, tensor);
  }
}

// ---- A schedule at many steps -------------------------------------------------------

template <typename Known>
__device__ void run(const ScheduleLaunch& launch) {
  const uint64_t stride = uint64_t(gridDim.x) * blockDim.x;
  for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < launch.size; i += stride) {
    launch.rates[i] = fused_math::schedule_value(launch.schedule, launch.steps[i]);
  }
}

} // namespace
} // namespace mlx_fused_optim::cuda
