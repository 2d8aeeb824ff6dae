// Double of metal-cpp: what the host code touches of it.
#pragma once

#include <cstddef>
#include <map>
#include <string>

#include "grid.h"

namespace NS {
using UInteger = size_t;
}

namespace MTL {

struct Size {
  Size(NS::UInteger width, NS::UInteger height, NS::UInteger depth)
      : width(width), height(height), depth(depth) {}
  NS::UInteger width, height, depth;
};

enum class DataType : NS::UInteger { DataTypeNone = 0, DataTypeUInt = 33, DataTypeBool = 53 };

struct Library {};

class ComputePipelineState {
 public:
  NS::UInteger maxTotalThreadsPerThreadgroup() const; // METAL_ON_CPU_MAX_THREADS, or 1024

  const metal_on_cpu::Kernel* kernel;
  std::map<int, uint32_t> constants; // by index
  std::string name;
};

} // namespace MTL
