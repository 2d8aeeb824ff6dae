// Four neighbours in registers, as the bits that memory has: what is loaded waits for
// nothing, and is made float32 when it is needed.
#pragma once

#include "common.cuh"
#include "math/frame.h"

namespace mlx_fused_optim::cuda {
namespace {

using fused_math::is_byte_format;
using fused_math::kBfloat16;
using fused_math::kByteGroup;
using fused_math::kByteRow;
using fused_math::kByteScale;
using fused_math::kByteSquares;
using fused_math::kFloat16;
using fused_math::kFloat32;
using fused_math::kInt8;

/// A word for each float32, half a word for each of a half type, a quarter for each int8. Of
/// rows of bytes the codes, and the scale of the group.
struct Quad {
  uint32_t words[kQuad];
};

// The cache operators are those of any load and store: marking them as streaming, all or
// some, was no faster on an H200 (docs/cuda.md), and new parameters are soon read again. But
// spelt out they stay one access, where the compiler would split it.
__device__ inline void load_whole(Quad& quad, const uint32_t* from) {
  const uint4 words = __ldca(reinterpret_cast<const uint4*>(from));
  quad = {{words.x, words.y, words.z, words.w}};
}
__device__ inline void load_whole(Quad& quad, const uint16_t* from) {
  const uint2 words = __ldca(reinterpret_cast<const uint2*>(from));
  quad = {{words.x, words.y, 0, 0}};
}
__device__ inline void load_whole(Quad& quad, const uint8_t* from) {
  quad = {{__ldca(reinterpret_cast<const uint32_t*>(from)), 0, 0, 0}};
}

/// The first `count`, `stride` elements apart; the others are zero.
__device__ inline void load_some(Quad& quad, const uint32_t* from, int64_t stride, uint32_t count) {
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    quad.words[k] = k < count ? from[k * stride] : 0;
  }
}
__device__ inline void load_some(Quad& quad, const uint16_t* from, int64_t stride, uint32_t count) {
  uint32_t halves[kQuad];
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    halves[k] = k < count ? from[k * stride] : 0;
  }
  quad = {{halves[0] | halves[1] << 16, halves[2] | halves[3] << 16, 0, 0}};
}
__device__ inline void load_some(Quad& quad, const uint8_t* from, int64_t stride, uint32_t count) {
  quad = {};
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    quad.words[0] |= k < count ? uint32_t(from[k * stride]) << 8 * k : 0;
  }
}

/// Codes and scale. What is not aligned comes in bytes.
template <bool whole>
__device__ inline void load_row(Quad& quad, const uint8_t* rows, uint64_t at, uint32_t count) {
  const uint8_t* row = rows + at / kByteGroup * kByteRow;
  const uint8_t* codes = row + kByteScale + at % kByteGroup;
  Quad scale = {};
  if constexpr (whole) {
    load_whole(quad, codes);
    load_whole(scale, row);
  } else if (count > 0) {
    load_some(quad, codes, 1, count);
    load_some(scale, row, 1, kByteScale);
  }
  quad.words[1] = scale.words[0];
}

/// The quad that begins at element `at`. Leaves it be where there is no array.
template <bool whole>
__device__ inline void load(
    Quad& quad,
    const void* data,
    uint32_t format,
    int64_t at,
    int64_t stride = 1,
    uint32_t count = kQuad) {
  auto load_from = [&](auto* from) {
    if constexpr (whole) {
      load_whole(quad, from);
    } else {
      load_some(quad, from, stride, count);
    }
  };
  if (is_byte_format(format)) {
    load_row<whole>(quad, static_cast<const uint8_t*>(data), at, count);
  } else if (format == kFloat32) {
    load_from(static_cast<const uint32_t*>(data) + at);
  } else if (format == kInt8) {
    load_from(static_cast<const uint8_t*>(data) + at);
  } else {
    load_from(static_cast<const uint16_t*>(data) + at);
  }
}

/// The scale with the first quad of its group.
template <bool whole>
__device__ inline void store_row(uint8_t* rows, uint64_t at, const Quad& quad, uint32_t count) {
  uint8_t* row = rows + at / kByteGroup * kByteRow;
  uint8_t* codes = row + kByteScale + at % kByteGroup;
  const bool is_first = at % kByteGroup == 0;
  if constexpr (whole) {
    __stwb(reinterpret_cast<uint32_t*>(codes), quad.words[0]);
    if (is_first) {
      __stwb(reinterpret_cast<uint32_t*>(row), quad.words[1]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      if (k < count) {
        codes[k] = static_cast<uint8_t>(quad.words[0] >> 8 * k);
      }
      if (is_first && count > 0) {
        row[k] = static_cast<uint8_t>(quad.words[1] >> 8 * k);
      }
    }
  }
}

template <bool whole>
__device__ inline void store(
    void* data,
    uint32_t format,
    uint64_t at,
    const Quad& quad,
    uint32_t count = kQuad) {
  auto& words = quad.words;
  if (is_byte_format(format)) {
    store_row<whole>(static_cast<uint8_t*>(data), at, quad, count);
  } else if (format == kFloat32) {
    auto* to = static_cast<uint32_t*>(data) + at;
    if constexpr (whole) {
      __stwb(reinterpret_cast<uint4*>(to), make_uint4(words[0], words[1], words[2], words[3]));
    } else {
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        if (k < count) {
          to[k] = words[k];
        }
      }
    }
  } else if (format == kInt8) {
    auto* to = static_cast<uint8_t*>(data) + at;
    if constexpr (whole) {
      __stwb(reinterpret_cast<uint32_t*>(to), words[0]);
    } else {
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        if (k < count) {
          to[k] = static_cast<uint8_t>(words[0] >> 8 * k);
        }
      }
    }
  } else {
    auto* to = static_cast<uint16_t*>(data) + at;
    if constexpr (whole) {
      __stwb(reinterpret_cast<uint2*>(to), make_uint2(words[0], words[1]));
    } else {
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        if (k < count) {
          to[k] = static_cast<uint16_t>(words[k / 2] >> k % 2 * 16);
        }
      }
    }
  }
}

// Bytes become numbers, and back, as the end of 2^23: conversions are as slow as roots.
__device__ inline float number_of_byte(uint32_t word, uint32_t k) {
  return fused_math::bits_to_float(__byte_perm(word, 0x4b000000u, 0x7440 | k)) - 8388608.0f;
}
__device__ inline float number_of_signed_byte(uint32_t word, uint32_t k) {
  return number_of_byte(word ^ 0x80808080u, k) - 128.0f;
}
/// Of numbers to which integer_base() is added.
__device__ inline uint32_t word_of_bytes(const float (&based)[kQuad]) {
  uint32_t bits[kQuad];
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    bits[k] = fused_math::float_to_bits(based[k]);
  }
  return __byte_perm(
      __byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040), 0x5410);
}

__device__ inline void widen(const Quad& quad, uint32_t format, float (&values)[kQuad]) {
  auto& words = quad.words;
  if (is_byte_format(format)) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      const float code =
          format == kByteSquares ? number_of_byte(words[0], k) : number_of_signed_byte(words[0], k);
      values[k] = fused_math::byte_value(code, fused_math::bits_to_float(words[1]), format);
    }
  } else if (format == kFloat32) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      values[k] = fused_math::bits_to_float(words[k]);
    }
  } else if (format == kBfloat16) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      const uint32_t word = words[k / 2];
      values[k] = fused_math::bits_to_float(k % 2 ? word & 0xffff0000u : word << 16);
    }
  } else if (format == kInt8) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      values[k] = number_of_signed_byte(words[0], k);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      const auto bits = static_cast<uint16_t>(words[k / 2] >> k % 2 * 16);
      values[k] = float_of_half(bits);
    }
  }
}

/// The values are numbers of the format: nothing is rounded.
__device__ inline void narrow(const float (&values)[kQuad], uint32_t format, Quad& quad) {
  auto& words = quad.words;
  if (format == kFloat32) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      words[k] = fused_math::float_to_bits(values[k]);
    }
    return;
  }
  if (format == kInt8) {
    float based[kQuad];
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      based[k] = values[k] + fused_math::integer_base();
    }
    words[0] = word_of_bytes(based);
    return;
  }
#pragma unroll
  for (int k = 0; k < kQuad; k += 2) {
    if (format == kBfloat16) {
      words[k / 2] = fused_math::float_to_bits(values[k]) >> 16 |
          (fused_math::float_to_bits(values[k + 1]) & 0xffff0000u);
    } else {
      words[k / 2] = half_of_float(values[k]) | uint32_t(half_of_float(values[k + 1])) << 16;
    }
  }
}

__device__ inline bool any_nan(const float (&x)[kQuad]) {
  static_assert(kQuad == 4);
  return !(x[0] == x[0] && x[1] == x[1] && x[2] == x[2] && x[3] == x[3]);
}

/// Rounds to nearest on the way, two in an instruction; what a NaN becomes is not the
/// hardware's but csrc/math's.
__device__ inline void round_and_narrow(float (&values)[kQuad], uint32_t format, Quad& quad) {
  if (format == kBfloat16 && !any_nan(values)) {
#pragma unroll
    for (int k = 0; k < kQuad; k += 2) {
      quad.words[k / 2] = bfloat16_pair(values[k], values[k + 1]);
    }
    return;
  }
  if (format == kBfloat16) {
#pragma unroll
    for (float& value : values) {
      value = fused_math::nearest_bfloat16(value);
    }
  }
  narrow(values, format, quad); // which rounds to float16
}

/// To codes, with the scale of the group, whose 16 threads all come here. Where nothing of a quad
/// is an exception, none is looked for in each element.
__device__ inline void narrow_to_bytes(
    uint32_t format,
    const float (&values)[kQuad],
    Quad& quad,
    uint32_t position,
    int slot,
    fused_math::RandomKey key,
    uint32_t flags) {
  const bool is_squares = format == kByteSquares;
  uint32_t bits[kQuad];
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    bits[k] = fused_math::float_to_bits(values[k]) & (is_squares ? ~0u : 0x7fffffffu);
  }
  uint32_t peak = max(max(bits[0], bits[1]), max(bits[2], bits[3]));
  const uint32_t least = min(min(bits[0], bits[1]), min(bits[2], bits[3]));
  const bool is_usual = least >= kLeastUsual && peak < 0x7f800000u;
  if (!is_usual) {
    peak = 0;
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      peak = max(peak, fused_math::byte_peak(values[k], format));
    }
  }
#pragma unroll
  for (uint32_t mask = 1; mask < kByteGroup / kQuad; mask *= 2) {
    peak = max(peak, __shfl_xor_sync(~0u, peak, mask));
  }
  const fused_math::ByteScale scale = peak >= kLeastUsual
      ? fused_math::byte_scale_of(root_of_usual(fused_math::bits_to_float(peak)), format)
      : fused_math::byte_scale(peak, format);
  float codes[kQuad];
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    codes[k] = fused_math::slot_dither<float>(position + k, slot, key, flags);
  }
  if (is_usual) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      // The rule has the root of a square.
      const float root = is_squares ? fused_math::root(values[k])
                                    : root_of_usual(fused_math::magnitude_of(values[k]));
      codes[k] = fused_math::usual_byte_code(values[k], root, scale, codes[k], format);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      codes[k] = fused_math::byte_code(values[k], scale, codes[k], format);
    }
  }
  quad = {{word_of_bytes(codes), fused_math::float_to_bits(scale.scale), 0, 0}};
}

} // namespace
} // namespace mlx_fused_optim::cuda
