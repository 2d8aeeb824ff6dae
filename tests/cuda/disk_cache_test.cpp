// csrc/cuda/disk_cache.cpp, as tests/test_cuda_source.py asks for it.
#include "cuda/disk_cache.h"

#include <cstdio>
#include <cstdlib>

using mlx_fused_optim::cuda::DiskCache;

int main(int, char** arguments) {
  const auto cache = DiskCache::of_user();
  const std::string what = arguments[1];
  if (what == "most") {
    std::printf("%zu\n", DiskCache::kMostFiles);
  } else if (what == "keep") {
    cache.keep(arguments[2], arguments[3]);
  } else if (what == "find") {
    const auto found = cache.find(arguments[2]);
    std::printf("%s\n", found ? ("found " + *found).c_str() : "none");
  } else { // what is found is what was kept
    const std::string value(100000, 'x');
    for (int i = std::atoi(arguments[2]); i > 0; --i) {
      cache.keep("key", value);
      if (cache.find("key") != value) {
        std::printf("not found, in round %d\n", i);
        return 1;
      }
    }
  }
}
