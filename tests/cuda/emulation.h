// Enough of CUDA for a C++ compiler to run the kernels, a block at a time and a thread
// for each of its threads: that what they index, load, fold and store is right can be
// seen without a GPU, by a sanitizer too.
#pragma once

#include <algorithm>
#include <barrier>
#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "math/portability.h"

// Inlined everywhere, as it is for the CPU backend, it would take minutes to compile.
#undef MATH_FN
#define MATH_FN static inline

#include "math/rounding.h"

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static // blocks run one after another

struct Index {
  uint32_t x;
};
inline thread_local Index threadIdx, blockIdx;
inline Index gridDim, blockDim;

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// The instructions that cuda/common.cuh writes.
inline float float_of_half(uint16_t bits) {
  return static_cast<float>(std::bit_cast<_Float16>(bits));
}
inline uint16_t half_of_float(float x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }
inline uint32_t bfloat16_pair(float x, float y) {
  auto half = [](float v) {
    return v == v ? fused_math::float_to_bits(fused_math::nearest_bfloat16(v)) >> 16 : 0x7fffu;
  };
  return half(x) | half(y) << 16;
}

template <typename T>
T __ldca(const T* from) {
  return *from;
}
template <typename T>
void __stwb(T* to, T value) {
  *to = value;
}

using std::max;
using std::min;

namespace emulation {

struct Warp {
  std::barrier<> barrier{32};
  uint32_t values[32];
};
inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<std::unique_ptr<Warp>> warps;

/// Runs `kernel()` as all threads of one block, a multiple of 32.
template <typename Kernel>
void run_block(uint32_t block, uint32_t threads, Kernel kernel) {
  block_barrier = std::make_unique<std::barrier<>>(threads);
  warps.clear();
  for (uint32_t i = 0; i < threads / 32; ++i) {
    warps.push_back(std::make_unique<Warp>());
  }
  std::vector<std::jthread> running;
  for (uint32_t i = 0; i < threads; ++i) {
    running.emplace_back([=] {
      threadIdx.x = i;
      blockIdx.x = block;
      kernel();
      block_barrier->arrive_and_drop();
      warps[i / 32]->barrier.arrive_and_drop();
    });
  }
}

} // namespace emulation

inline void __syncthreads() { emulation::block_barrier->arrive_and_wait(); }
inline void __syncwarp() { emulation::warps[threadIdx.x / 32]->barrier.arrive_and_wait(); }

namespace emulation {
/// The value of lane `from`.
template <typename T>
T shuffle(T value, uint32_t from) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  auto& warp = *warps[threadIdx.x / 32];
  std::memcpy(&warp.values[threadIdx.x % 32], &value, sizeof(T));
  warp.barrier.arrive_and_wait();
  std::memcpy(&value, &warp.values[from], sizeof(T));
  warp.barrier.arrive_and_wait();
  return value;
}
} // namespace emulation

template <typename T>
T __shfl_down_sync(uint32_t, T value, uint32_t distance) {
  const uint32_t lane = threadIdx.x % 32;
  return emulation::shuffle(value, lane + distance < 32 ? lane + distance : lane);
}

template <typename T>
T __shfl_xor_sync(uint32_t, T value, uint32_t mask) {
  return emulation::shuffle(value, threadIdx.x % 32 ^ mask);
}
