#include "grid.h"

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <numeric>
#include <random>

#include "shared.h"

namespace metal_on_cpu {

namespace {

std::vector<uint32_t> arranged(size_t count, Order order) {
  std::vector<uint32_t> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  if (order == Order::reverse) {
    std::reverse(numbers.begin(), numbers.end());
  } else if (order == Order::shuffled) {
    std::shuffle(numbers.begin(), numbers.end(), std::minstd_rand(count));
  }
  return numbers;
}

// ---- Threads that wait for each other ------------------------------------------

/// A thread of the threadgroup that runs, with a stack of its own.
struct Fiber {
  ucontext_t context;
  bool ended = false;
};

constexpr size_t kMostFibers = 1024;
constexpr size_t kStackBytes = 1 << 16;
char stacks[kMostFibers][kStackBytes]; // static: memory.h knows it as our own

struct Group {
  Memory* memory;
  std::vector<Fiber> fibers;
  std::function<void(uint32_t)> call; // one thread, by its lane
  std::map<std::string, std::vector<char>> shared;
  std::array<std::array<uint32_t, kMostFibers>, 2> shuffled{}; // by lane
  std::array<uint32_t, kMostFibers> shuffles{}; // that a lane has called
  ucontext_t scheduler;
  uint32_t running = 0;
};
Group* current = nullptr; // one dispatch runs at a time

void enter() {
  current->call(current->running);
  current->fibers[current->running].ended = true;
}

/// Turns of all threads, from barrier to barrier, until all have ended.
void run_by_turns(Group& group, uint32_t first, const std::vector<uint32_t>& lanes) {
  current = &group;
  for (size_t i = 0; i < group.fibers.size(); ++i) {
    auto& context = group.fibers[i].context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[i];
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = &group.scheduler;
    makecontext(&context, enter, 0);
  }
  for (size_t ended = 0; ended < lanes.size(); group.memory->barrier()) {
    for (uint32_t lane : lanes) {
      group.memory->begin_thread(first + lane);
      group.running = lane;
      swapcontext(&group.scheduler, &group.fibers[lane].context);
    }
    ended = std::count_if(
        group.fibers.begin(), group.fibers.end(), [](auto& fiber) { return fiber.ended; });
    if (ended > 0 && ended < lanes.size()) {
      group.memory->fail("a barrier is not reached by every thread");
      break;
    }
  }
  group.memory->end_group();
  current = nullptr;
}

} // namespace

void* shared_bytes(const char* name, unsigned long size) {
  auto& bytes = current->shared[name];
  if (bytes.empty()) {
    bytes.assign(size, '\xff'); // NaN
    current->memory->share(bytes.data(), size, name);
  }
  return bytes.data();
}

extern "C" void metal_on_cpu_barrier(int flags) {
  if (!current || flags != 2) {
    std::fputs("[metal_on_cpu] only mem_threadgroup, and only beside threadgroup memory\n", stderr);
    std::abort();
  }
  swapcontext(&current->fibers[current->running].context, &current->scheduler);
}

namespace {

constexpr uint32_t kSimdThreads = 32;

/// The value that the thread of this lane of the threadgroup has given.
uint32_t shuffled(uint32_t value, uint32_t (*from)(uint32_t lane, uint32_t of), uint32_t of) {
  if (!current || of >= kSimdThreads) {
    std::fputs("[metal_on_cpu] a shuffle beyond its SIMD group, or in no threadgroup\n", stderr);
    std::abort();
  }
  // By turns in two places: who writes one again has passed the barrier of the other, before
  // which all have read it.
  const uint32_t lane = current->running;
  auto& values = current->shuffled[current->shuffles[lane]++ % 2];
  values[lane] = value;
  metal_on_cpu_barrier(2);
  return values[from(lane, of)];
}

} // namespace

extern "C" uint32_t metal_on_cpu_shuffle(uint32_t value, uint32_t lane) {
  return shuffled(
      value,
      [](uint32_t own, uint32_t of) { return own / kSimdThreads * kSimdThreads + of; },
      lane);
}

extern "C" uint32_t metal_on_cpu_shuffle_xor(uint32_t value, uint32_t mask) {
  return shuffled(value, [](uint32_t own, uint32_t of) { return own ^ of; }, mask);
}

void run_grid(
    const Kernel& kernel,
    Buffers& buffers,
    size_t threads,
    size_t group_size,
    Order order,
    Memory& memory) {
  for (uint32_t group : arranged((threads + group_size - 1) / group_size, order)) {
    const size_t first = group * group_size;
    const size_t size = std::min(group_size, threads - first);
    const auto lanes = arranged(size, order);
    auto call = [&](uint32_t lane) {
      kernel.call(
          kernel.arguments.data(),
          buffers,
          {uint32_t(first + lane), lane, group, uint32_t(threads), uint32_t(size)});
    };
    if (kernel.cooperative) {
      Group together{&memory, std::vector<Fiber>(size), call, {}, {}, {}, {}, 0};
      run_by_turns(together, first, lanes);
      continue;
    }
    for (uint32_t lane : lanes) {
      memory.begin_thread(first + lane);
      call(lane);
    }
  }
}

} // namespace metal_on_cpu
