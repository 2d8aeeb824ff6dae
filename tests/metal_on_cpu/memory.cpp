#include "memory.h"

#include <link.h>
#include <pthread.h>

#include <algorithm>

namespace metal_on_cpu {

namespace {

constexpr uint32_t kMany = ~0u; // more than one reader

// Looked at in each access: of a model that takes no call.
[[gnu::tls_model("initial-exec")]] thread_local Memory* watched = nullptr;

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
    ranges_.emplace_back(static_cast<char*>(begin), static_cast<char*>(begin) + size);
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
          if (of(segments, &watched_module).first) {
            auto& ranges = static_cast<OwnMemory*>(self)->ranges_;
            ranges.insert(ranges.end(), segments.begin(), segments.end());
          }
          return 0;
        },
        this);
  }
  using Range = std::pair<const char*, const char*>;
  /// The range that has the address, or an empty one.
  Range of(const char* address) const { return of(ranges_, address); }

 private:
  static Range of(const std::vector<Range>& ranges, const char* address) {
    auto has = [&](auto& r) { return r.first <= address && address < r.second; };
    auto found = std::find_if(ranges.begin(), ranges.end(), has);
    return found == ranges.end() ? Range() : *found;
  }
  static constexpr char watched_module = 0; // lies in this module
  std::vector<Range> ranges_;
};

} // namespace

void watch(Memory* memory) { watched = memory; }

void Memory::begin_dispatch(bool after_barrier) {
  regions_.clear();
  forget_places();
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
    found->users = &users_[found->begin];
    if (use == value) {
      found->users->clear();
    }
    found->users->resize(size);
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
  regions_.back().users = &users_[regions_.back().begin];
  regions_.back().users->clear();
  regions_.back().users->resize(size);
  forget_places();
}

void Memory::barrier() {
  for (auto& region : regions_) {
    if (region.kind == Region::shared) {
      region.users->clear();
      region.users->resize(region.size);
    }
  }
}

void Memory::end_group() {
  forget_places();
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

Memory::Place Memory::find(const char* address) {
  for (auto& region : regions_) {
    if (region.begin <= address && address < region.begin + region.size) {
      return {region.begin, region.begin + region.size, &region};
    }
  }
  thread_local const OwnMemory own;
  const auto [begin, end] = own.of(address);
  return {begin, end, nullptr};
}

template <size_t size, bool write>
void Memory::access(const void* at) {
  auto* address = static_cast<const char*>(at);
  auto& place = places_[reinterpret_cast<uintptr_t>(address) / 4096 % places_.size()];
  if (address < place.begin || address >= place.end) {
    place = find(address);
  }
  if (place.region) {
    check<size, write>(*place.region, address);
  } else if (!place.begin) {
    fail(std::string(write ? "a write" : "a read") + " outside of every buffer");
  }
}

template <size_t size, bool write>
void Memory::check(Region& region, const char* address) {
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
  auto* readers = &region.users->readers[at];
  auto* writers = &region.users->writers[at];
  const uint32_t thread = thread_;
  uint32_t written = 0, written_by_others = 0, read = 0, read_by_others = 0; // bytes
  for (size_t i = 0; i < size; ++i) {
    written += writers[i] != 0;
    written_by_others += writers[i] != 0 && writers[i] != thread;
    read += readers[i] != 0;
    read_by_others += readers[i] != 0 && readers[i] != thread;
  }
  if (written_by_others) {
    return report(region, address, size, "touches what another thread wrote");
  }
  if (write && written) {
    return report(region, address, size, "writes a second time");
  }
  if (write && read_by_others) {
    return report(region, address, size, "writes what another thread read");
  }
  for (size_t i = 0; i < size; ++i) {
    if (write) {
      writers[i] = thread;
    } else {
      readers[i] = readers[i] == 0 || readers[i] == thread ? thread : kMany;
    }
  }
  region.traffic.read_again += write ? 0 : read;
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
      metal_on_cpu::watched->access<bytes, false>(address);           \
    }                                                                 \
  }                                                                   \
  extern "C" void __sanitizer_cov_store##bytes(const void* address) { \
    if (metal_on_cpu::watched) {                                      \
      metal_on_cpu::watched->access<bytes, true>(address);            \
    }                                                                 \
  }
TRACE(1)
TRACE(2)
TRACE(4)
TRACE(8)
TRACE(16)
