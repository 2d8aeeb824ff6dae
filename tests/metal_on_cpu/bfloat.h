// The compiler's own conversion to bfloat, which the run-time library of GCC 12
// and earlier lacks: to nearest even.
#pragma once

extern "C" __attribute__((weak, no_sanitize("coverage"))) __bf16 __truncsfbf2(float x) {
  const unsigned bits = __builtin_bit_cast(unsigned, x);
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  const unsigned rounded = is_nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
  return __builtin_bit_cast(__bf16, static_cast<unsigned short>(rounded >> 16));
}
