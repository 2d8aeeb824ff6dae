// The buffers of a dispatch that are told apart by number: bytes, as what lies in which one
// differs from step to step (metal/table.h). (number, slot)
#pragma once

#include "math/portability.h"

// clang-format off
#define LATER_BUFFERS(X)                                                        \
  X(1, 5) X(2, 6) X(3, 7) X(4, 8) X(5, 9) X(6, 10) X(7, 11) X(8, 12) X(9, 13)   \
  X(10, 14) X(11, 15) X(12, 16) X(13, 17) X(14, 18) X(15, 19) X(16, 20) X(17, 21) \
  X(18, 22) X(19, 23) X(20, 24) X(21, 25) X(22, 26) X(23, 27) X(24, 28) X(25, 29) X(26, 30)
#define BUFFERS(X) X(0, 4) LATER_BUFFERS(X)
#define BUFFER_ARGUMENT(i, slot) device char* buffer##i [[buffer(slot)]],
#define SOURCE_ARGUMENT(i, slot) device const char* buffer##i [[buffer(slot)]],
#define BUFFER_FIELD(i, slot) device char* of##i;
#define BUFFER_NAME(i, slot) buffer##i,
#define BUFFER_OF_NUMBER(i, slot) case i: return buffers.of##i;
#define TAKE_ELEMENTS(i, slot) case i - 1: elements = buffer##i; break;
// clang-format on

struct Buffers {
  BUFFERS(BUFFER_FIELD)
};

/// A switch, not an array: arrays of pointers that are indexed live in memory. Of a number
/// that is known where the kernel is compiled, nothing is left of it.
inline device char* buffer_of(Buffers buffers, uint32_t number) {
  switch (number) { BUFFERS(BUFFER_OF_NUMBER) }
  return buffers.of0;
}
