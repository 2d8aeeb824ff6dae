#include "graph/layout.h"

#include <algorithm>
#include <cstdio>
#include <limits>

namespace mlx_fused_optim {

size_t element_count(const mx::Shape& shape) {
  size_t count = 1;
  for (auto length : shape) {
    count *= length;
  }
  return count;
}

std::string path_name(std::string_view path) {
  std::string name(path.empty() ? path : path.substr(1));
  std::replace_if(name.begin(), name.end(), is_path_key, '.');
  return name;
}

mx::Shape arena_shape(const Arena& arena) {
  constexpr size_t kLargest = std::numeric_limits<mx::ShapeElem>::max();
  if (arena.size <= kLargest) {
    return {static_cast<mx::ShapeElem>(arena.size)};
  }
  auto row = static_cast<mx::ShapeElem>(kArenaAlignment / arena.dtype.size());
  return {static_cast<mx::ShapeElem>(arena.size / row), row};
}

void Fingerprint::reserve(size_t tensors, size_t bytes) {
  bytes_.reserve(bytes + 12 * tensors);
  ends_.reserve(tensors);
}

void Fingerprint::add(std::string_view path, const mx::Shape& shape, mx::Dtype dtype) {
  const size_t end = bytes_.size();
  bytes_.resize(end + path.size() + 3 + 4 * shape.size());
  auto* next = std::copy(path.begin(), path.end(), bytes_.data() + end);
  // Bytes that no path contains end each part; dimensions go in little-endian.
  *next++ = 0xff;
  *next++ = dtype == mx::float32 ? 1 : dtype == mx::float16 ? 2 : 3;
  for (auto length : shape) {
    for (int b = 0; b < 4; ++b) {
      *next++ = static_cast<uint32_t>(length) >> (8 * b);
    }
  }
  *next = 0xfe;
  ends_.push_back(bytes_.size());
  number_.reset();
}

uint64_t Fingerprint::number() const {
  if (!number_) {
    number_ = 0xcbf29ce484222325;
    for (auto byte : bytes_) {
      number_ = (*number_ ^ byte) * 0x100000001b3;
    }
  }
  return *number_;
}

std::string fingerprint_text(uint64_t number) {
  char text[17];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(number));
  return text;
}

/// With the gap to the next tensor (elements).
static size_t padded_size(const TensorSpec& spec) {
  const size_t granule = kArenaAlignment / spec.dtype.size();
  return (element_count(spec.shape) + granule - 1) / granule * granule;
}

Layout make_layout(std::vector<TensorSpec> tensors, size_t least_of_bytes, size_t limit) {
  size_t bytes = 0;
  for (auto& spec : tensors) {
    bytes += padded_size(spec) * spec.dtype.size();
  }
  if (limit == 0) {
    limit = std::clamp(bytes / kArenaShare, kSmallestArenaLimit, kLargestArenaLimit);
  }

  std::vector<Arena> arenas;
  for (size_t t = 0; t < tensors.size(); ++t) {
    auto& spec = tensors[t];
    const size_t size = padded_size(spec);
    const bool is_small = element_count(spec.shape) < least_of_bytes;

    // Only the latest arena of a kind can have room: tensors keep their order.
    Arena* arena = nullptr;
    for (auto& candidate : arenas) {
      if (candidate.dtype == spec.dtype && candidate.is_small == is_small) {
        arena = &candidate;
      }
    }
    if (!arena || (arena->size > 0 && (arena->size + size) * spec.dtype.size() > limit)) {
      arena = &arenas.emplace_back(Arena{spec.dtype});
      arena->is_small = is_small;
    }
    arena->tensors.push_back(t);
    arena->shapes.push_back(spec.shape);
    arena->offsets.push_back(arena->size);
    arena->size += size;
  }

  Fingerprint of_all;
  for (auto& spec : tensors) {
    of_all.add(spec.path, spec.shape, spec.dtype);
  }
  Layout layout{std::move(tensors), {}, std::move(of_all)};
  for (auto& arena : arenas) {
    Fingerprint fingerprint;
    for (int t : arena.tensors) {
      auto& spec = layout.tensors[t];
      fingerprint.add(spec.path, spec.shape, spec.dtype);
    }
    arena.fingerprint = fingerprint.number();
    layout.arenas.push_back(std::make_shared<const Arena>(std::move(arena)));
  }
  return layout;
}

} // namespace mlx_fused_optim
