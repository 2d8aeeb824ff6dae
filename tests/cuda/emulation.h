// Enough of CUDA for a C++ compiler to run the kernels, a block at a time and its threads by
// turns, each with a stack of its own: that what they index, load, fold and store is right can
// be seen without a GPU, by a sanitizer too.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
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
inline Index threadIdx, blockIdx, gridDim, blockDim;

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

inline float root_of_usual(float x) { return fused_math::sqrt_float(x); }
/// Four of the eight bytes of both words.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t chosen) {
  const uint64_t both = uint64_t(y) << 32 | x;
  uint32_t word = 0;
  for (int k = 0; k < 4; ++k) {
    word |= uint32_t(both >> 8 * (chosen >> 4 * k & 7) & 0xff) << 8 * k;
  }
  return word;
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

constexpr size_t kStackBytes = 1 << 17;

struct Thread {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t context;
  bool ended;
};
inline std::vector<Thread> threads; // of the block that runs, and more
inline ucontext_t scheduler;
inline std::function<void()> kernel;
inline size_t events; // by which a block comes nearer to its end

/// Until the other threads had their turns.
inline void yield() { swapcontext(&threads[threadIdx.x].context, &scheduler); }

class Barrier {
 public:
  explicit Barrier(uint32_t expected) : expected_(expected) {}
  void wait() {
    const auto turn = passed_;
    ++arrived_;
    pass_if_all_are_here();
    while (passed_ == turn) {
      yield();
    }
  }
  /// A thread that has ended is waited for no more.
  void drop() {
    --expected_;
    pass_if_all_are_here();
  }

 private:
  void pass_if_all_are_here() {
    ++events;
    if (arrived_ == expected_) {
      arrived_ = 0;
      ++passed_;
    }
  }
  uint32_t expected_, arrived_ = 0, passed_ = 0;
};

struct Warp {
  Barrier barrier{32};
  uint32_t values[32];
};
inline std::vector<Warp> warps;
inline std::unique_ptr<Barrier> block_barrier;

inline void run_thread() {
  kernel();
  threads[threadIdx.x].ended = true;
  block_barrier->drop();
  warps[threadIdx.x / 32].barrier.drop();
}

/// Runs `kernel()` as all threads of one block, a multiple of 32: in order, and then in
/// reverse, from barrier to barrier. Without a barrier one of two threads comes too early.
inline void run_block(uint32_t block, uint32_t count, std::function<void()> run) {
  kernel = std::move(run);
  blockIdx.x = block;
  block_barrier = std::make_unique<Barrier>(count);
  warps.assign(count / 32, {});
  threads.resize(std::max<size_t>(threads.size(), count));
  for (uint32_t i = 0; i < count; ++i) {
    auto& thread = threads[i];
    thread.ended = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, run_thread, 0);
  }
  for (uint32_t turn = block, running = count; running > 0; ++turn) {
    const size_t before = events;
    running = 0;
    for (uint32_t i = 0; i < count; ++i) {
      threadIdx.x = turn % 2 ? count - 1 - i : i;
      if (auto& thread = threads[threadIdx.x]; !thread.ended) {
        swapcontext(&scheduler, &thread.context);
        running += !thread.ended;
      }
    }
    if (running > 0 && events == before) {
      std::puts("a barrier that not every thread reaches");
      std::exit(1);
    }
  }
}

} // namespace emulation

inline void __syncthreads() { emulation::block_barrier->wait(); }
inline void __syncwarp() { emulation::warps[threadIdx.x / 32].barrier.wait(); }

namespace emulation {
/// The value of lane `from`.
template <typename T>
T shuffle(T value, uint32_t from) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  auto& warp = warps[threadIdx.x / 32];
  std::memcpy(&warp.values[threadIdx.x % 32], &value, sizeof(T));
  warp.barrier.wait();
  std::memcpy(&value, &warp.values[from], sizeof(T));
  warp.barrier.wait();
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
template <typename T>
T __shfl_sync(uint32_t, T value, uint32_t lane) {
  return emulation::shuffle(value, lane);
}
