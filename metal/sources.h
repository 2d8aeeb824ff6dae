// The buffers of parameters and gradients, in whatever way they are spread: one
// arena and a buffer a gradient, or a buffer for each of both. (number, slot)
#pragma once

// clang-format off
#define SOURCES(X)                                                             \
  X(0, 7) X(1, 8) X(2, 9) X(3, 10) X(4, 11) X(5, 12) X(6, 13) X(7, 14)         \
  X(8, 15) X(9, 16) X(10, 17) X(11, 18) X(12, 19) X(13, 20) X(14, 21) X(15, 22) \
  X(16, 23) X(17, 24) X(18, 25) X(19, 26) X(20, 27) X(21, 28) X(22, 29) X(23, 30)
#define FULL_SOURCES(X)                                                        \
  X(0, 15) X(1, 16) X(2, 17) X(3, 18) X(4, 19) X(5, 20) X(6, 21) X(7, 22)      \
  X(8, 23) X(9, 24) X(10, 25) X(11, 26) X(12, 27) X(13, 28) X(14, 29) X(15, 30)
#define SOURCE_ARGUMENT(i, slot) device const char* source##i [[buffer(slot)]],
#define TAKE_PARAMETER(i, slot) case i: parameters = source##i; break;
#define TAKE_GRADIENT(i, slot) case i: gradients = source##i; break;
#define TAKE_ELEMENTS(i, slot) case i: elements = source##i; break;
// clang-format on
