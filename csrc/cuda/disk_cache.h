// Compiled kernels in files, for the next process. No CUDA and no MLX here.
#pragma once

#include <optional>
#include <string>

namespace mlx_fused_optim::cuda {

/// Values by key, in a folder that any number of processes may use at once. It serves where it
/// can: a file that is missing, broken or truncated is not found, one that cannot be written is
/// no error. The oldest files go where there are more than kMostFiles.
class DiskCache {
 public:
  static constexpr size_t kMostFiles = 1024;

  /// Without a folder ("") it keeps nothing.
  explicit DiskCache(std::string folder) : folder_(std::move(folder)) {}

  /// In the folder that MLX_FUSED_OPTIM_KERNEL_CACHE names, else in the user's cache.
  static DiskCache of_user();

  std::optional<std::string> find(const std::string& key) const;
  void keep(const std::string& key, const std::string& value) const;

 private:
  std::string path_of(const std::string& key) const;
  void drop_old_files() const;

  std::string folder_;
};

} // namespace mlx_fused_optim::cuda
