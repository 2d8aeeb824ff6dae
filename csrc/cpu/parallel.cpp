#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

#include "mlx/threadpool.h"

namespace mlx_fused_optim::cpu {

namespace {

size_t thread_count() {
  const char* text = std::getenv("MLX_FUSED_OPTIM_NUM_THREADS");
  const long wanted = text ? std::strtol(text, nullptr, 10) : 0;
  return wanted > 0 ? std::min(wanted, 1024L) : std::max(1u, std::thread::hardware_concurrency());
}

/// The other threads. Never destroyed: at exit a stream may still be running.
ThreadPool& helpers(size_t count) {
  static auto* pool = new ThreadPool(count);
  return *pool;
}

} // namespace

void parallel_for(size_t size, size_t grain, const std::function<void(size_t, size_t)>& body) {
  static const size_t available = thread_count();
  const size_t threads = std::min(available, size / grain);
  if (threads <= 1) {
    body(0, size);
    return;
  }
  // Pieces become smaller towards the end, so that a core that is taken away for a moment does not
  // hold up the others, and none waits for long for the last piece of another.
  const size_t least = std::max<size_t>(grain / 4, 1);
  std::atomic<size_t> next{0};
  auto work = [&] {
    for (size_t begin = next; begin < size;) {
      const size_t end = std::min(size, begin + std::max(least, (size - begin) / (threads * 2)));
      if (next.compare_exchange_weak(begin, end)) {
        body(begin, end);
        begin = next;
      }
    }
  };
  std::vector<std::future<void>> done;
  done.reserve(threads - 1);
  for (size_t i = 1; i < threads; ++i) {
    done.push_back(helpers(available - 1).enqueue(work));
  }
  work();
  for (auto& helper : done) {
    helper.wait();
  }
}

} // namespace mlx_fused_optim::cpu
