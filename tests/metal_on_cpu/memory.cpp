#include "memory.h"

#include <link.h>
#include <pthread.h>

#include <algorithm>

namespace metal_on_cpu {

namespace {

constexpr uint32_t kMany = ~0u; // more than one reader

thread_local Memory* watched = nullptr;

/// Local variables, and constants of the kernels' own: not memory of the GPU's.
class OwnMemory {
 public:
  OwnMemory() {
    pthread_attr_t attributes;
    void* begin;
    size_t size;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &begin, &size);
    pthread_attr_destroy(&attributes);
    ranges_.emplace_back(begin, static_cast<char*>(begin) + size);
    dl_iterate_phdr(
        [](dl_phdr_info* module, size_t, void* self) {
          std::vector<Range> segments;
          for (int i = 0; i < module->dlpi_phnum; ++i) {
            auto& header = module->dlpi_phdr[i];
            auto* start = reinterpret_cast<const char*>(module->dlpi_addr + header.p_vaddr);
            if (header.p_type == PT_LOAD) {
              segments.emplace_back(start, start + header.p_memsz);
            }
          }
          if (contains(segments, &watched_module)) {
            auto& ranges = static_cast<OwnMemory*>(self)->ranges_;
            ranges.insert(ranges.end(), segments.begin(), segments.end());
          }
          return 0;
        },
        this);
  }
  bool has(const void* address) const { return contains(ranges_, address); }

 private:
  using Range = std::pair<const void*, const void*>;
  static bool contains(const std::vector<Range>& ranges, const void* address) {
    return std::any_of(ranges.begin(), ranges.end(), [&](auto& r) {
      return r.first <= address && address < r.second;
    });
  }
  static constexpr char watched_module = 0; // lies in this module
  std::vector<Range> ranges_;
};

} // namespace

void watch(Memory* memory) { watched = memory; }

void Memory::begin_dispatch(bool after_barrier) {
  regions_.clear();
  threads_before_ = after_barrier ? 0 : last_thread_;
  if (after_barrier) {
    users_.clear();
  }
}

void Memory::add(const void* begin, size_t size, const std::string& name, Use use) {
  auto is_begin = [&](auto& region) { return region.begin == begin; };
  auto found = std::find_if(regions_.begin(), regions_.end(), is_begin);
  if (found == regions_.end()) {
    const auto kind = use == value ? Region::value : Region::buffer;
    regions_.push_back({static_cast<const char*>(begin), size, name, kind});
    found = regions_.end() - 1;
    auto& users = users_[found->begin];
    if (use == value) {
      users.clear();
    }
    users.resize(size);
  } else if (use == output || !found->is_input || name.compare(0, 6, "buffer")) {
    // (One source fills all slots that nothing else needs: once is enough.)
    found->name += "," + name;
  }
  found->is_input |= use == input;
  found->is_output |= use == output;
}

void Memory::begin_thread(uint32_t number) {
  thread_ = threads_before_ + number + 1;
  last_thread_ = std::max(last_thread_, thread_);
}

void Memory::share(const void* begin, size_t size, const std::string& name) {
  regions_.push_back({static_cast<const char*>(begin), size, name, Region::shared});
  users_[regions_.back().begin].assign(size, {});
}

void Memory::barrier() {
  for (auto& region : regions_) {
    if (region.kind == Region::shared) {
      users_[region.begin].assign(region.size, {});
    }
  }
}

void Memory::end_group() {
  std::erase_if(regions_, [&](auto& region) {
    if (region.kind != Region::shared) {
      return false;
    }
    users_.erase(region.begin); // the address may come again
    return true;
  });
}

void Memory::fail(const std::string& what) {
  if (error_.empty()) {
    error_ = what;
  }
}

void Memory::access(const void* address, size_t size, bool write) {
  auto* first = static_cast<const char*>(address);
  for (auto& region : regions_) {
    if (first >= region.begin && first < region.begin + region.size) {
      return check(region, first, size, write);
    }
  }
  thread_local const OwnMemory own;
  if (!own.has(address)) {
    fail(std::string(write ? "a write" : "a read") + " outside of every buffer");
  }
}

void Memory::check(Region& region, const char* address, size_t size, bool write) {
  const size_t at = address - region.begin;
  if (at + size > region.size) {
    return report(region, address, size, "reaches over its end");
  }
  // (Fields of a value, the compiler may load together.)
  if (region.kind != Region::value && at % size) {
    return report(region, address, size, "is not aligned to its width");
  }
  if (write && region.kind == Region::buffer && !region.is_output) {
    return report(region, address, size, "writes into what is bound as an input");
  }
  auto* users = &users_[region.begin][at];
  for (size_t i = 0; i < size; ++i) {
    auto& [reader, writer] = users[i];
    if (writer != 0 && writer != thread_) {
      return report(region, address, size, "touches what another thread wrote");
    }
    if (write) {
      if (writer == thread_) {
        return report(region, address, size, "writes a second time");
      }
      if (reader != 0 && reader != thread_) {
        return report(region, address, size, "writes what another thread read");
      }
      writer = thread_;
    } else {
      region.traffic.read_again += reader != 0;
      reader = reader == 0 || reader == thread_ ? thread_ : kMany;
    }
  }
  (write ? region.traffic.written : region.traffic.read) += size;
  ++region.traffic.accesses;
}

void Memory::report(const Region& r, const char* address, size_t size, const std::string& what) {
  fail(
      "an access of " + std::to_string(size) + " bytes at byte " +
      std::to_string(address - r.begin) + " of " + r.name + " (" + std::to_string(r.size) +
      " bytes) " + what);
}

std::map<std::string, Traffic> Memory::traffic() const {
  std::map<std::string, Traffic> result;
  for (auto& region : regions_) {
    if (region.kind == Region::buffer) {
      result[region.name] = region.traffic;
    }
  }
  return result;
}

} // namespace metal_on_cpu

#define TRACE(bytes)                                                  \
  extern "C" void __sanitizer_cov_load##bytes(const void* address) {  \
    if (metal_on_cpu::watched) {                                      \
      metal_on_cpu::watched->access(address, bytes, false);           \
    }                                                                 \
  }                                                                   \
  extern "C" void __sanitizer_cov_store##bytes(const void* address) { \
    if (metal_on_cpu::watched) {                                      \
      metal_on_cpu::watched->access(address, bytes, true);            \
    }                                                                 \
  }
TRACE(1)
TRACE(2)
TRACE(4)
TRACE(8)
TRACE(16)
