#include "cuda/disk_cache.h"

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <vector>

namespace mlx_fused_optim::cuda {

namespace fs = std::filesystem;

namespace {

/// FNV-1a.
uint64_t hash_of(const std::string& text, uint64_t hash = 0xcbf29ce484222325) {
  for (const unsigned char byte : text) {
    hash = (hash ^ byte) * 0x100000001b3;
  }
  return hash;
}

/// What a file has before its value: of both, so that neither is another's.
std::string checksum(const std::string& key, const std::string& value) {
  const uint64_t sum = hash_of(value, hash_of(key));
  return {reinterpret_cast<const char*>(&sum), sizeof(sum)};
}

bool write(int file, const std::string& text) {
  for (size_t done = 0; done < text.size();) {
    const auto written = ::write(file, text.data() + done, text.size() - done);
    if (written <= 0) {
      return false;
    }
    done += written;
  }
  return true;
}

} // namespace

DiskCache DiskCache::of_user() {
  if (const char* folder = std::getenv("MLX_FUSED_OPTIM_KERNEL_CACHE")) {
    return DiskCache(folder);
  }
  const char* home = std::getenv("HOME");
  const char* cache = std::getenv("XDG_CACHE_HOME");
  if (cache && *cache) {
    return DiskCache(std::string(cache) + "/mlx_fused_optim");
  }
  return DiskCache(home && *home ? std::string(home) + "/.cache/mlx_fused_optim" : "");
}

std::string DiskCache::path_of(const std::string& key) const {
  char name[64];
  const unsigned long long first = hash_of(key), second = hash_of(key, ~first);
  std::snprintf(name, sizeof(name), "/%016llx%016llx.kernel", first, second);
  return folder_ + name;
}

std::optional<std::string> DiskCache::find(const std::string& key) const {
  if (folder_.empty()) {
    return {};
  }
  std::ifstream file(path_of(key), std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  if (text.size() < sizeof(uint64_t)) {
    return {};
  }
  std::string value = text.substr(sizeof(uint64_t));
  if (text.compare(0, sizeof(uint64_t), checksum(key, value)) != 0) {
    return {};
  }
  return value;
}

void DiskCache::keep(const std::string& key, const std::string& value) const {
  if (folder_.empty()) {
    return;
  }
  std::error_code failed;
  fs::create_directories(folder_, failed);
  // Under a name of its own first: whoever reads finds all of a file or none.
  std::string temporary = folder_ + "/kernel-XXXXXX";
  const int file = ::mkstemp(temporary.data());
  if (file < 0) {
    return;
  }
  const bool written = write(file, checksum(key, value) + value);
  if (::close(file) != 0 || !written || std::rename(temporary.c_str(), path_of(key).c_str()) != 0) {
    ::unlink(temporary.c_str());
  }
  drop_old_files();
}

void DiskCache::drop_old_files() const {
  std::error_code failed;
  std::vector<std::pair<fs::file_time_type, fs::path>> files;
  for (auto& entry : fs::directory_iterator(folder_, failed)) {
    if (entry.is_regular_file(failed)) {
      files.emplace_back(entry.last_write_time(failed), entry.path());
    }
  }
  if (files.size() > kMostFiles) {
    std::sort(files.begin(), files.end());
    for (size_t i = 0; i < files.size() / 2; ++i) {
      fs::remove(files[i].second, failed);
    }
  }
}

} // namespace mlx_fused_optim::cuda
