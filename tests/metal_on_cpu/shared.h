// For the kernels' text, before everything else: no header of the host, see metal_stdlib.
#pragma once

namespace metal_on_cpu {

/// Memory of the threadgroup that runs, the same for all of its threads, and garbage at
/// first: what `threadgroup T name[count];` is to Metal.
void* shared_bytes(const char* name, unsigned long size); // grid.cpp

template <typename T>
T* shared_memory(const char* name, unsigned long count) {
  return static_cast<T*>(shared_bytes(name, sizeof(T) * count));
}

} // namespace metal_on_cpu
