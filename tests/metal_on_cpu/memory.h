// Every access of the kernels to memory, checked: clang calls these checks at each
// load and store (-fsanitize-coverage=func,trace-loads,trace-stores).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace metal_on_cpu {

/// How the kernels used one buffer during a dispatch.
struct Traffic {
  size_t read = 0; // bytes
  size_t read_again = 0; // of `read`, by the same or another thread since the barrier
  size_t written = 0; // bytes
  size_t accesses = 0; // loads and stores
};

/// The buffers of a dispatch, and who touched each byte since the last barrier.
///
/// Memory of a threadgroup lasts as long as it, and has barriers of its own.
///
/// An error is an access outside every buffer, one that is not aligned to its own
/// width, a write into what is no output, one byte written twice, and a byte that one thread writes
/// and another reads or writes: between barriers, threads and dispatches run in any order.
class Memory {
 public:
  /// Begins a dispatch; `after_barrier` forgets what earlier ones touched.
  void begin_dispatch(bool after_barrier);
  /// The name is for messages; a buffer may have several. Only an output may be written.
  enum Use { input, output, value };
  void add(const void* begin, size_t size, const std::string& name, Use use);
  /// Begins a thread, or goes on with it.
  void begin_thread(uint32_t number);
  /// Memory of the threadgroup that runs.
  void share(const void* begin, size_t size, const std::string& name);
  /// What the threadgroup did to its own memory is done.
  void barrier();
  void end_group();
  template <size_t size, bool write>
  void access(const void* address);

  void fail(const std::string& what);
  /// What went wrong first, or nothing.
  const std::string& error() const { return error_; }
  std::map<std::string, Traffic> traffic() const;

 private:
  struct Users { // of each byte: numbers of threads, or 0
    std::vector<uint32_t> readers, writers;
    void clear() { readers.clear(), writers.clear(); }
    void resize(size_t size) { readers.resize(size), writers.resize(size); }
  };
  struct Region {
    const char* begin = nullptr;
    size_t size = 0;
    std::string name;
    enum Kind { buffer, value, shared } kind = buffer; // traffic is counted of buffers
    Traffic traffic = {};
    bool is_input = false, is_output = false; // of buffers
    Users* users = nullptr;
  };
  /// Where an access was found to be; without a region, it is memory of our own.
  struct Place {
    const char* begin = nullptr;
    const char* end = nullptr;
    Region* region = nullptr;
  };

  Place find(const char* address);
  void forget_places() { places_.fill({}); }
  template <size_t size, bool write>
  void check(Region& region, const char* address);
  void report(const Region& region, const char* address, size_t size, const std::string& what);

  std::vector<Region> regions_;
  std::array<Place, 64> places_; // found before, by page
  std::map<const char*, Users> users_; // by the region's beginning
  uint32_t threads_before_ = 0; // of earlier dispatches since the barrier
  uint32_t thread_ = 0;
  uint32_t last_thread_ = 0;
  std::string error_;
};

/// Directs the checks of this thread of the host to `memory`, or to nothing.
void watch(Memory* memory);

} // namespace metal_on_cpu
