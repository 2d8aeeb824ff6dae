#include "math/portability.h"

/// A copy in row-major order of an array of any strides; T has its element's size.
template <typename T>
[[kernel]] void pack_elements(
    device const T* from [[buffer(0)]],
    device T* to [[buffer(1)]],
    constant int32_t* shape [[buffer(2)]],
    constant int64_t* strides [[buffer(3)]],
    constant uint32_t& dimensions [[buffer(4)]],
    constant uint64_t& size [[buffer(5)]],
    uint32_t position [[thread_position_in_grid]],
    uint32_t positions [[threads_per_grid]]) {
  for (uint64_t i = position; i < size; i += positions) {
    uint64_t rest = i;
    int64_t at = 0;
    for (uint32_t d = dimensions; d-- > 0;) {
      at += int64_t(rest % uint32_t(shape[d])) * strides[d];
      rest /= uint32_t(shape[d]);
    }
    to[i] = from[at];
  }
}

#define INSTANTIATE(name, ...) \
  template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;
INSTANTIATE("pack_1", pack_elements<uint8_t>)
INSTANTIATE("pack_2", pack_elements<uint16_t>)
INSTANTIATE("pack_4", pack_elements<uint32_t>)
